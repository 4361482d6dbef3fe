"""What each training step gave."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_mst.callback import MSTCallback

__all__ = ["History"]


log = logging.getLogger(__name__)

# Names among the trainer's metrics.
_LOSSES, _PEAKS, _STEPS = "history_losses", "history_peak_memory_gib", "history_steps"
_WHERE = "history_peak_memory_where"


class History(pl.Callback):
    """Keeps the loss of every optimizer step and the metrics of the steps, whatever the loggers are.

    Put it last, so that it sees what the other callbacks logged. Every process has to have one: a step's loss is the
    mean over all of them.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []  # stays on the device: a transfer per step would make the CPU wait
        self._accumulated: list[Tensor] = []
        self._step = 0
        self.started = False  # whether training has begun: what fails earlier is the configuration
        self._peaks: list[Tensor] = []
        self._where: str | None = None
        self._tokens_per_second: Tensor | None = None
        self._seconds_per_step: Tensor | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remembers where training begins."""
        self._step = trainer.global_step
        self.started = True

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes down the step's metrics."""
        metrics = trainer.callback_metrics
        if "train_loss" in metrics:
            self._accumulated.append(metrics["train_loss"].detach().clone())
        if trainer.global_step > self._step:  # the optimizer has stepped on what has been accumulated
            self._step = trainer.global_step
            if self._accumulated:
                loss = torch.stack(self._accumulated).mean()
                self._losses.append(trainer.strategy.reduce(loss, reduce_op="mean"))
            self._accumulated = []
            self._report(trainer)
        if "peak_memory_gib" in metrics:
            self._peaks.append(metrics["peak_memory_gib"].detach().clone())
        if "tokens_per_second" in metrics:
            self._tokens_per_second = metrics["tokens_per_second"]

    def _report(self, trainer: pl.Trainer) -> None:
        """About ten lines over a run that no progress bar shows."""
        bar = trainer.progress_bar_callback
        every = max(1, trainer.max_steps // 10) if trainer.max_steps > 0 else 10
        if (bar is None or bar.is_disabled) and self._step % every == 0 and trainer.is_global_zero and self._losses:
            log.info("step %d: loss %.4f", self._step, self._losses[-1])

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds what it kept to the trainer's metrics: they alone come back from a process that Lightning spawned."""
        lists = {_LOSSES: self._losses, _PEAKS: self._peaks}
        trainer.callback_metrics.update({key: torch.stack(values) for key, values in lists.items() if values})
        trainer.callback_metrics[_STEPS] = torch.tensor(self._step)
        self._seconds_per_step = trainer.callback_metrics.get("seconds_per_step")
        self._where = _where_memory_was_highest(trainer)
        if self._where is not None:
            trainer.callback_metrics[_WHERE] = torch.tensor(list(self._where.encode()))  # as numbers come back alone

    def take_over(self, trainer: pl.Trainer) -> None:
        """Takes what the copy of this object has kept that saw the training in a spawned process."""
        metrics = trainer.callback_metrics
        self._step = int(metrics[_STEPS])
        self._losses, self._peaks = list(metrics.get(_LOSSES, ())), list(metrics.get(_PEAKS, ()))
        self._tokens_per_second = metrics.get("tokens_per_second")
        self._seconds_per_step = metrics.get("seconds_per_step")
        if _WHERE in metrics:
            self._where = bytes(metrics[_WHERE].tolist()).decode()

    @property
    def steps(self) -> int:
        """Optimizer steps so far, those of the run that this one resumes included."""
        return self._step

    @property
    def losses(self) -> list[float]:
        """Loss of each optimizer step (mean over the batches that it accumulated, on all devices)."""
        return [float(loss) for loss in self._losses]

    @property
    def peak_memory_gib(self) -> float | None:
        """The highest peak of all steps, or None where nothing measured it."""
        return max((float(peak) for peak in self._peaks), default=None)

    @property
    def peak_memory_where(self) -> str | None:
        """Where in its step the main process had its highest peak, or None where nothing can tell."""
        return self._where

    @property
    def tokens_per_second(self) -> float | None:
        """Over the whole training, or None where nothing measured it."""
        return None if self._tokens_per_second is None else float(self._tokens_per_second)

    @property
    def seconds_per_step(self) -> float | None:
        """The median of the main process's steps but the first, or None where nothing measured it."""
        return None if self._seconds_per_step is None else float(self._seconds_per_step)


def _where_memory_was_highest(trainer: pl.Trainer) -> str | None:
    logs = [callback.memory for callback in trainer.callbacks if isinstance(callback, MSTCallback)]
    highest = logs[0].highest if logs else None
    return str(highest.place) if highest is not None and highest.place is not None else None
