"""Predicted against measured peak memory, at the beginning of a run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_mst.memory.log import MemoryLog, StepMemory
from lightning_mst.memory.prediction import Prediction
from lightning_mst.training.optimizers import free_gradients_in_backward
from lightning_mst.training.predicted import CannotRehearse, RehearsedProgram
from lightning_mst.units import in_words

__all__ = ["PredictionCheck", "ends_step"]

TOLERANCE = 0.10
# What matmuls of an accelerator take for themselves (cuBLAS: up to 32 MiB for each of two threads and more) comes from
# the allocator as well, and decides nothing but in small models.
WORKSPACES = 128 * 2**20


class PredictionCheck:
    """Compares what a step should take with what it took, and says both in one line.

    The first step of a run has no optimizer states and no gradients yet, and a rehearsed step has both. So

    1. the *forward and backward pass of the first step* are compared with those of a rehearsal without an optimizer,
       and the peak that is predicted for all later steps is told beside it;
    2. where the first step differs more (an optimizer in the backward pass, whose states come up in between; states
       from a checkpoint), the next whole step is compared with a whole step.

    Args:
        log: takes the prediction.
        of_allocator: whether an accelerator's allocator is what is measured, which rounds and serves kernels, too.
    """

    def __init__(self, log: MemoryLog, *, of_allocator: bool) -> None:
        self._log = log
        self._slack = WORKSPACES if of_allocator else 0
        self._batches = 0
        self._fresh = False
        self._done = False

    def begin(self, trainer: Trainer) -> None:
        """Looks at the optimizer's states before a step."""
        if self._batches == 0:
            states = any(getattr(optimizer, "state", None) for optimizer in trainer.strategy.optimizers)
            self._fresh = not states and not free_gradients_in_backward(trainer)

    def end(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, step: StepMemory) -> None:
        """Compares, if this is the step for it."""
        self._batches += 1
        whole = self._batches > 1 and ends_step(trainer, batch_idx)
        if self._done or not step.places or not (self._fresh or whole):
            return
        self._done = True
        if not trainer.is_global_zero:
            return

        try:
            program = RehearsedProgram(trainer, pl_module, batch, batch_idx)
            later = program.predict()
            predicted = program.predict_first_passes() if self._fresh else later
        except CannotRehearse as reason:
            rank_zero_info(f"No prediction of the peak memory beside the measured one: {reason}.")
            return
        self._log.predicted = later
        place = step.place_in(("forward", "backward")) if self._fresh else step.place
        if place is None:
            return
        measured = step.places[place]
        apart = abs(predicted.tensors - measured)
        message = (
            f"Peak memory of {'the first forward and backward pass' if self._fresh else 'a training step'}: predicted "
            f"{in_words(predicted.tensors)} ({_place_of(predicted)}), measured {in_words(measured)} ({place}), "
            f"{apart / measured:.1%} apart."
        )
        if self._fresh:
            message += f" From the second step on, with the optimizer's states: {in_words(later.tensors)} predicted."
        if apart > max(TOLERANCE * measured, self._slack):
            rank_zero_warn(
                f"{message} That is more than {TOLERANCE:.0%}: something in the step was not foreseen, such as other"
                " models on the device, or attention that is not of the flash kind."
            )
        else:
            rank_zero_info(message)


def ends_step(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the optimizer steps after this batch, and not only accumulates its gradients."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def _place_of(prediction: Prediction) -> str:
    return prediction.block if prediction.phase == "optimizer" else f"{prediction.phase} of {prediction.block}"
