"""What ``MSTCallback`` measures of memory in a run: the log, the check of the prediction, the timeline."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from lightning_mst.memory.log import MemoryLog
from lightning_mst.rewrite.handle import MSTHandle
from lightning_mst.training.predicted_check import PredictionCheck
from lightning_mst.training.step_memory import StepMeter, metrics_of
from lightning_mst.training.timeline import TimelineRecorder

__all__ = ["MemoryMonitor"]


class MemoryMonitor:
    """Measures every training step from ``begin`` to ``end``, until ``stop``.

    Args:
        trainer: the Trainer.
        pl_module: the LightningModule.
        handle: of its rewrite.
        log_memory: as of ``MSTCallback``, like the next one.
        memory_timeline: draw one step.

    Attributes:
        log: what was measured so far.
        meter: measures; told of the step's phases by the owner.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        handle: MSTHandle,
        *,
        log_memory: bool | Literal["tensors"],
        memory_timeline: bool,
    ) -> None:
        self._trainer = trainer
        self._pl_module = pl_module
        self._log_memory = log_memory
        self.log = MemoryLog()
        self._timeline = TimelineRecorder(trainer, handle) if memory_timeline else None
        self._check: PredictionCheck | None = None
        self.meter = StepMeter(trainer, pl_module, tensors=log_memory == "tensors")
        if log_memory == "tensors" or memory_timeline:
            self.meter.check_can_follow_tensors()
        of_allocator = self.meter.memory.of_allocator
        if log_memory == "tensors" or (log_memory and of_allocator):
            self._check = PredictionCheck(self.log, of_allocator=of_allocator and log_memory is True)

    def begin(self, batch: Any, batch_idx: int) -> None:
        """A step begins."""
        if self._check is not None:
            self._check.begin(self._trainer)
        record = self._timeline is not None and self._timeline.wants(batch_idx)
        if self._timeline is not None and record:
            self._timeline.begin()
        if self._log_memory or record:
            self.meter.begin(batch, record=record)

    def end(self, batch: Any, batch_idx: int) -> None:
        """A step is over: logs it."""
        step = self.meter.end()
        if step is None:
            return
        if self._log_memory:
            self.log.add(step)
            for name, value in metrics_of(step, self._trainer.strategy.root_device).items():
                in_bar = name == "peak_memory_gib"
                self._pl_module.log(name, value, prog_bar=in_bar, on_step=True, on_epoch=False, reduce_fx="max")
        if self._check is not None:
            self._check.end(self._trainer, self._pl_module, batch, batch_idx, step)
        if self._timeline is not None and self._timeline.recording:
            assert self.meter.held is not None
            self._timeline.end(self.meter.held, self._pl_module, batch, batch_idx)

    def draw(self) -> None:
        """Training is over: draws the timeline."""
        if self._timeline is not None:
            self._timeline.write(self._pl_module)

    def stop(self) -> None:
        """Takes all hooks away."""
        if self._timeline is not None:
            self._timeline.drop_step()
        self.meter.close()
