"""A fit that resumes within an epoch reads exactly the batches that the uninterrupted fit read after the checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import RandomSampler

from lightning_mst.data import TextDataModule


class Recorder(pl.LightningModule):
    """Writes down the sequences of every batch that it trains on, with the number that Lightning gives the batch."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fails_at = fails_at
        self.batches: list[tuple[int, int, tuple[int, ...]]] = []

    def training_step(self, batch, batch_idx):
        if len(self.batches) == self.fails_at:
            raise ArithmeticError("this step fails")
        ids = tuple(hash(tuple(row)) for row in batch["input_ids"].tolist())
        self.batches.append((self.current_epoch, batch_idx, ids))
        return self.weight * len(ids)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def make_data(text_folder, cache_dir):
    def make(**options) -> TextDataModule:
        data = TextDataModule(
            source="text",
            paths=str(text_folder),
            vocab_size=300,
            sequence_length=32,
            max_tokens=32 * 13,  # 7 batches of 2 sequences, the last one smaller
            cache_dir=str(cache_dir),
            **{"batch_size": 2, **options},
        )
        data.prepare_data()
        data.setup()
        return data

    return make


def fit(data: TextDataModule, *, checkpoint=None, fails_at=None, callbacks=(), **options) -> Recorder:
    module = Recorder(fails_at=fails_at)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 3, "limit_val_batches": 0, **options},
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*not resumable.*")
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return module


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize(
    ("options", "batches_per_epoch"),
    [
        ({}, 7),
        ({"accumulate_grad_batches": 2}, 7),
        ({"limit_train_batches": 5}, 5),
        ({"limit_val_batches": 1, "val_check_interval": 3}, 7),
        ({"max_epochs": -1, "max_steps": 17}, 7),
        ({"reload_dataloaders_every_n_epochs": 1}, 7),
        ({"overfit_batches": 3}, 3),
    ],
    ids=lambda options: "-".join(options) if isinstance(options, dict) else "",
)
def test_each_checkpoint_is_followed_by_the_same_batches(make_data, tmp_path, options, batches_per_epoch):
    whole = fit(make_data(), callbacks=[every_step(tmp_path)], **options).batches
    assert len(set(whole)) == len(whole)
    checkpoints = list(tmp_path.glob("*.ckpt"))
    accumulated = options.get("accumulate_grad_batches", 1)
    steps_per_epoch = -(-batches_per_epoch // accumulated)
    assert len(checkpoints) >= 2 * steps_per_epoch
    for path in checkpoints:
        epochs, steps = divmod(int(path.stem.removeprefix("step=")), steps_per_epoch)
        done = epochs * batches_per_epoch + steps * accumulated
        assert fit(make_data(), checkpoint=path, **options).batches == whole[done:], path.name


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_differ_and_a_crash_in_the_second_one_loses_no_batch(make_data, tmp_path, num_workers):
    data = {"num_workers": num_workers}
    whole = fit(make_data(**data)).batches
    assert sorted(ids for epoch, _, batch in whole for ids in batch if epoch == 0) == sorted(
        ids for epoch, _, batch in whole for ids in batch if epoch == 1
    )
    assert [ids for *_, ids in whole[:7]] != [ids for *_, ids in whole[7:14]]
    with pytest.raises(ArithmeticError):
        # Written within the batch that failed, which must be tried again.
        fit(make_data(**data), fails_at=10, callbacks=[OnExceptionCheckpoint(tmp_path)])
    assert fit(make_data(**data), checkpoint=tmp_path / "on_exception.ckpt").batches == whole[10:]


@pytest.mark.parametrize("on_train_epoch_end", [True, False], ids=["end of epoch", "end of validation"])
def test_a_checkpoint_between_epochs_is_followed_by_the_next_epoch(make_data, tmp_path, on_train_epoch_end):
    options = {"limit_val_batches": 1}
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=on_train_epoch_end)
    whole = fit(make_data(), callbacks=[saving], **options).batches
    assert fit(make_data(), checkpoint=tmp_path / "step=14.ckpt", **options).batches == whole[14:]


def test_batches_that_were_done_are_not_read_again(make_data, tmp_path, monkeypatch):
    fit(make_data(), callbacks=[every_step(tmp_path)], max_epochs=1)
    data = make_data()
    read = []
    get = type(data.train_dataset).__getitem__
    monkeypatch.setattr(
        type(data.train_dataset), "__getitem__", lambda self, index: read.append(index) or get(self, index)
    )
    fit(data, checkpoint=tmp_path / "step=5.ckpt", max_epochs=1)
    assert len(read) == 3  # of 13


def test_other_data_or_processes_are_reported_once_and_training_goes_on(make_data, tmp_path):
    whole = fit(make_data(), callbacks=[every_step(tmp_path)]).batches
    with pytest.warns(UserWarning, match=r"sequences per batch: 2 then, 1 now; seed: 0 then, 1 now\)") as caught:
        rest = fit(make_data(batch_size=1, seed=1), checkpoint=tmp_path / "step=3.ckpt").batches
    assert sum("within an epoch" in str(warning.message) for warning in caught) == 1
    assert rest[0][:2] == whole[3][:2]


def test_evaluation_and_passes_outside_the_trainer_are_whole_after_resuming(make_data, tmp_path):
    fit(make_data(), callbacks=[every_step(tmp_path)])
    data = make_data()
    trainer = fit(data, checkpoint=tmp_path / "step=3.ckpt").trainer
    trainer.validate(Recorder(), datamodule=data, ckpt_path=tmp_path / "step=3.ckpt")
    loader = data.train_dataloader()
    first, second = ([batch["input_ids"].tolist() for batch in loader] for _ in range(2))
    assert len(first) == len(second) == 7
    assert first != second


def test_each_process_resumes_with_its_own_share(make_data):
    def loader_of(rank: int, done: int = 0):
        data = make_data()
        share = {"num_replicas": 2, "rank": rank}
        fit_loop = SimpleNamespace(batch_idx=done - 1)
        data.trainer = SimpleNamespace(distributed_sampler_kwargs=share, fit_loop=fit_loop)
        return data.train_dataloader()

    for rank in range(2):
        whole = loader_of(rank)
        batches = [batch["input_ids"].tolist() for batch in whole]
        resumed = loader_of(rank, done=2)
        resumed.load_state_dict(whole.state_dict())
        assert [batch["input_ids"].tolist() for batch in resumed] == batches[2:]
    shares = [{tuple(row) for batch in loader_of(rank) for row in batch["input_ids"].tolist()} for rank in range(2)]
    assert len(shares[0] | shares[1]) == 13


def test_a_trainer_that_is_given_the_loader_alone_shares_it_out_itself(make_data):
    loader = make_data().train_dataloader()
    assert isinstance(loader.sampler, RandomSampler)  # the kind that Lightning replaces under several processes
    first, second = ([batch["input_ids"].tolist() for batch in loader] for _ in range(2))
    assert first != second
