"""Tokens per second of the training steps, and seconds of each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_mst.training.ranks import num_replicas

__all__ = ["Throughput"]


class Throughput(pl.Callback):
    """Logs ``tokens_per_second``: over all batches so far but the first, on all devices together.

    The first batch warms up (allocators, kernel choice, compilation, a check of the gradients), so it counts only
    while it is the only one. Time between batches, such as validation, does not count. Devices that share a batch
    (tensor parallelism) count its tokens once. Lightning's ``ThroughputMonitor``
    counts over a sliding window, goes to loggers alone and asks for FLOPs; this one number goes to
    ``trainer.callback_metrics`` as well.

    At the end ``trainer.callback_metrics`` has ``seconds_per_step`` as well, of the main process: the median of all
    optimizer steps but the first, each with the batches that it accumulated; not if there was but one.

    Reads the number of tokens from ``batch["input_ids"]``, ``(B, S)``.
    """

    def __init__(self) -> None:
        self._start = 0.0
        self._steps = 0
        self._tokens = 0
        self._seconds = 0.0
        self._optimizer_steps = 0
        self._unfinished = 0.0
        self._of_steps: list[float] = []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts over."""
        self._steps = 0
        self._optimizer_steps, self._unfinished, self._of_steps = trainer.global_step, 0.0, []

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock."""
        self._start = _now(trainer)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
    ) -> None:
        """Stops the clock and logs."""
        seconds = _now(trainer) - self._start
        self._steps += 1
        if self._steps <= 2:  # step 2 takes the place of step 1
            self._tokens, self._seconds = 0, 0.0
        self._tokens += batch["input_ids"].numel()
        self._seconds += seconds
        rate = self._tokens / self._seconds
        # Summed over the devices, each with its own batches or its part of one.
        rate /= trainer.world_size / num_replicas(trainer)
        self.log("tokens_per_second", rate, prog_bar=True, sync_dist=True, reduce_fx="sum")
        self._unfinished += seconds
        if trainer.global_step > self._optimizer_steps:  # the optimizer has stepped on what has been accumulated
            self._of_steps.append(self._unfinished)
            self._optimizer_steps, self._unfinished = trainer.global_step, 0.0

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the median time of a step to the trainer's metrics: they alone come back from a spawned process."""
        if len(self._of_steps) > 1:
            median = statistics.median(self._of_steps[1:])
            trainer.callback_metrics["seconds_per_step"] = torch.tensor(median, dtype=torch.float64)


def _now(trainer: pl.Trainer) -> float:
    """Seconds, once the device has done all it was given to do."""
    device = trainer.strategy.root_device
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).synchronize(device)
    return time.perf_counter()
