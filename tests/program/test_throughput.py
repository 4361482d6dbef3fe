"""Tokens per second."""

from __future__ import annotations

import time
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from lightning_mst.program.throughput import Throughput


class Sleeper(BoringModel):
    """Sleeps for as many seconds as the batch says."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        time.sleep(float(batch["seconds"]))
        return self.layer(torch.ones(1, 32)).sum()


def tokens_per_second(*seconds: float) -> float:
    batches = [{"input_ids": torch.zeros(2, 50), "seconds": torch.tensor(second)} for second in seconds]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[Throughput()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Sleeper(), DataLoader(batches, batch_size=None))
    return float(trainer.callback_metrics["tokens_per_second"])


def test_the_first_step_does_not_count_when_there_are_more():
    assert tokens_per_second(1.0, 0.1, 0.3) == pytest.approx(200 / 0.4, rel=0.25)


def test_the_only_step_counts():
    assert tokens_per_second(0.2) == pytest.approx(100 / 0.2, rel=0.25)


def test_the_tokens_of_a_batch_that_two_devices_share_count_once(monkeypatch):
    logged = {}
    throughput = Throughput()
    monkeypatch.setattr(throughput, "log", lambda name, value, **_: logged.update({name: value}), raising=False)
    clock = iter([0.0, 2.0])
    monkeypatch.setattr("lightning_mst.program.throughput._now", lambda trainer: next(clock))
    trainer = SimpleNamespace(global_step=1, world_size=4, distributed_sampler_kwargs={"num_replicas": 2, "rank": 0})

    throughput.on_train_batch_start(trainer, None, None, 0)
    throughput.on_train_batch_end(trainer, None, None, {"input_ids": torch.zeros(1, 100)}, 0)

    # 100 tokens in 2 seconds on each of 4 devices, which see 2 different batches: 200 tokens in 2 seconds.
    assert 4 * logged["tokens_per_second"] == 100
