"""Checkpoints to resume from."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

__all__ = ["Checkpoints"]


class Checkpoints(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, which also writes one after the last step, wherever ``every_n_train_steps`` is.

    It is written within the epoch. Lightning's own, when training has ended, counts the epoch as over: a longer run
    that resumes from it leaves out the rest of that epoch's data.
    """

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes a checkpoint if one is due, or if this was the last step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
        is_last = trainer.global_step == trainer.max_steps or (last_epoch and trainer.is_last_batch)
        # Lightning has no public way to let a checkpoint count as one of this callback's.
        if is_last and not self._should_skip_saving_checkpoint(trainer):
            metrics = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, metrics)
            self._save_last_checkpoint(trainer, metrics)
