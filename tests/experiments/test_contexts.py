"""Perplexity against context length, and the time of a step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from lightning_mst.cli import main
from lightning_mst.program.contexts import SameTokens, check_one_device, read_context_lengths
from lightning_mst.program.errors import ConfigurationError
from lightning_mst.program.throughput import Throughput


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``train(*overrides)`` trains a tiny model for three steps and gives back the result."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {number} follows line {number - 1}" for number in range(800)), encoding="utf-8")
    run_dir = tmp_path / "run"
    tiny = [
        "data=text", f"data.paths=['{text}']", f"data.cache_dir='{tmp_path / 'cache'}'", "data.vocab_size=300",
        "data.sequence_length=64", "data.validation_fraction=0.2", "model.config.hidden_size=32",
        "model.config.intermediate_size=64", "model.config.num_hidden_layers=1", "trainer=cpu", "trainer.max_steps=3",
        "trainer.limit_val_batches=1.0", "logger=none", f"hydra.run.dir='{run_dir}'",
    ]  # fmt: skip

    def run(*overrides: str) -> dict[str, Any]:
        main(["train", *tiny, *overrides])
        return json.loads((run_dir / "result.json").read_text(encoding="utf-8"))

    return run


def test_at_the_length_of_training_the_perplexity_of_the_same_tokens_is_that_of_the_validation(train):
    # 1,024 tokens fill whole sequences of every length; a limit on what is validated is none on them.
    several = train("task.context_lengths=[64,128,512]", "data.max_tokens=1024", "trainer.limit_val_batches=1")
    alone = train("data.max_tokens=1024")

    assert several["context_perplexity"].keys() == {"64", "128", "512"}
    assert several["context_perplexity"]["64"] == pytest.approx(alone["val_perplexity"], rel=1e-6)
    assert several["val_perplexity"] != pytest.approx(alone["val_perplexity"], rel=1e-6)
    assert several["seconds_per_step"] > 0
    assert alone["context_perplexity"] is None


def test_the_same_tokens_count_at_every_length():
    tokens = np.arange(24, dtype=np.uint16)

    def counted(length: int) -> list[int]:
        sequences = [SameTokens(tokens, length=length, shortest=4)[i]["labels"] for i in range(24 // length)]
        return [int(label) for labels in sequences for label in labels[1:] if label != -100]

    assert counted(4) == counted(8) == counted(24) == [token for token in range(24) if token % 4]


@pytest.mark.parametrize(
    ("lengths", "limit", "message"),
    [
        ([64, 96], None, "each of them divide the last"),
        ([128, 64], None, "should ascend"),
        (64, None, "a list of whole numbers, 2 or more"),
        ([64, 128], 100, "should be at least the longest"),
    ],
)
def test_lengths_that_cannot_be_compared_are_refused(lengths, limit, message):
    config = OmegaConf.create({"task": {"context_lengths": lengths, "context_tokens": limit}})
    with pytest.raises(ConfigurationError, match=message):
        read_context_lengths(config)


def test_a_context_longer_than_the_held_out_text_is_refused_before_a_step_is_taken(train, capsys):
    with pytest.raises(SystemExit):
        train("task.context_lengths=[64,65536]")
    told = capsys.readouterr()
    assert "fewer than the longest context of 65,536" in " ".join(told.err.split())
    assert "step 1" not in told.out


def test_several_devices_are_refused():
    with pytest.raises(ConfigurationError, match=r"on one device, got 2\. Set trainer\.devices=1"):
        check_one_device(SimpleNamespace(world_size=2))


def test_the_time_of_a_step_is_the_median_of_all_but_the_first_with_the_batches_that_it_accumulated(monkeypatch):
    # Two batches a step, which take 9 + 9, 1 + 2, 3 + 4 and 1 + 1 seconds; what lies between them does not count.
    seconds = [9, 9, 1, 2, 3, 4, 1, 1]
    clock = iter([tick for index, second in enumerate(seconds) for tick in (100 * index, 100 * index + second)])
    monkeypatch.setattr("lightning_mst.program.throughput._now", lambda trainer: next(clock))
    throughput = Throughput()
    monkeypatch.setattr(throughput, "log", lambda *_, **__: None, raising=False)
    trainer = SimpleNamespace(global_step=0, world_size=1, distributed_sampler_kwargs=None, callback_metrics={})

    throughput.on_train_start(trainer, None)
    for index in range(len(seconds)):
        throughput.on_train_batch_start(trainer, None, None, index)
        trainer.global_step = (index + 1) // 2
        throughput.on_train_batch_end(trainer, None, None, {"input_ids": torch.zeros(1, 8)}, index)
    throughput.on_fit_end(trainer, None)

    assert trainer.callback_metrics["seconds_per_step"] == 3
