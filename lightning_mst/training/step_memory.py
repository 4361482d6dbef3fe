"""Measures the memory of a Trainer's steps, each in its phases and blocks."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_mst.memory.log import PHASES, PeakByPlace, StepMemory
from lightning_mst.memory.peak import PeakMemory
from lightning_mst.memory.places import Phase, Places, Where, blocks_of
from lightning_mst.memory.step_tensors import tensors_of_step
from lightning_mst.memory.tensor_bytes import TensorBytes
from lightning_mst.training.predicted import is_compiled
from lightning_mst.training.ranks import num_ranks
from lightning_mst.training.wrapping import wrapped

__all__ = ["StepMeter", "metrics_of"]


class StepMeter:
    """Measures one step after the other; between ``begin`` and ``end`` it has hooks on modules and optimizers.

    In Lightning, forward and backward pass run inside of the optimizer's step, so the phases follow Lightning's own
    hooks, which the owner passes on. Optimizers that step in the backward pass are noticed by themselves. Of a compiled
    model only the phases are told apart: hooks on its blocks would break its graphs.

    Args:
        trainer: the Trainer.
        pl_module: the LightningModule, in the form that it is trained in.
        tensors: count the exact bytes of tensors, instead of the allocator's or the process's.

    Attributes:
        memory: what is measured if tensors are not.
        places: where the step is.
        held: the tensors of the last step, if they were followed.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, *, tensors: bool) -> None:
        self._trainer = trainer
        self._pl_module = pl_module
        self._tensors = tensors
        self.memory = PeakMemory(trainer.strategy.root_device)
        self._compiled = is_compiled(pl_module)
        self._blocks: dict[nn.Module, Where] = {} if self._compiled else blocks_of(pl_module)
        self._in_backward = False
        self._step: ExitStack | None = None
        self._number = 0
        self._peaks: PeakByPlace | None = None
        self.places: Places | None = None
        self.held: TensorBytes | None = None
        self._whole_run = ExitStack()
        self._whole_run.enter_context(wrapped(trainer.strategy, "training_step", self._training_step))
        if not tensors and not self.memory.resettable:
            rank_zero_warn(
                f"peak_memory_gib is the {self.memory.description}: it can only grow from step to step, and where in a"
                " step it occurs can't be told."
            )
        if not tensors and self.memory.read() is None:
            rank_zero_warn("Nothing on this system measures peak memory, so peak_memory_gib is not logged.")
        if self._compiled:
            rank_zero_info("The model is compiled: the memory of its passes is measured, but not of its blocks.")

    def check_can_follow_tensors(self) -> None:
        """Makes sure that operators can be followed.

        Raises:
            MisconfigurationException: the model is compiled.
        """
        if self._compiled:
            raise MisconfigurationException(
                "log_memory='tensors' and memory_timeline=True follow each operator, for which torch would run a"
                " compiled model as if it were not compiled. Use log_memory=True, or leave out torch.compile."
            )

    def begin(self, batch: Any, *, record: bool = False) -> None:
        """Starts to measure.

        Args:
            batch: of the step.
            record: keep every change of the tensors' bytes.
        """
        self.drop_step()
        self._step = ExitStack()
        self._number = self._trainer.global_step
        self.places, self.held, self._peaks = Places(self._blocks), None, None
        if not self._compiled:
            self._step.enter_context(self.places.followed())
        if not self._pl_module.automatic_optimization:
            self._step.callback(register_optimizer_step_post_hook(self._after_manual_step).remove)
        if self._tensors or record:
            optimizers = self._trainer.strategy.optimizers
            self.held = self._step.enter_context(
                tensors_of_step(self._pl_module, optimizers, batch, self.places, record=record)
            )
        if self._tensors or not self.memory.resettable:
            self.memory.reset()
        else:
            self._peaks = PeakByPlace(self.memory, self.places)

    def end(self) -> StepMemory | None:
        """Takes the hooks away and tells what was measured; ``None`` where nothing could be."""
        if self._step is None:
            return None
        reading = self.memory.read_all() if self._peaks is None else self._peaks.end()
        by_place = {} if self._peaks is None else self._peaks.peaks
        self.drop_step()
        allocator = reading if self.memory.of_allocator else None
        allocated, reserved = allocator or (None, None)
        if self._tensors:
            assert self.held is not None
            peaks = self.held.peaks
            step = StepMemory(
                self._number, self.held.peak, {p: peak.total for p, peak in peaks.items()}, allocated, reserved
            )
            return replace(step, kinds=dict(peaks[step.place].kinds)) if step.place else step
        if self._compiled:
            by_place = {place._replace(block="a compiled model"): peak for place, peak in by_place.items()}
        return StepMemory(self._number, reading.peak, by_place, allocated, reserved) if reading else None

    def drop_step(self) -> None:
        """Takes the hooks away, if there are any."""
        if self._step is not None:
            self._step.close()
        self._step = None

    def close(self) -> None:
        """Leaves the Trainer as it was."""
        self.drop_step()
        self._whole_run.close()

    def before_backward(self) -> None:
        """The forward pass is over."""
        self._in_backward = True
        self._begin_phase("backward")

    def after_backward(self) -> None:
        """The backward pass is over."""
        self._in_backward = False
        if not self._pl_module.automatic_optimization:
            self._begin_phase("forward")

    def before_optimizer_step(self) -> None:
        """Gradients are clipped and weights are changed next."""
        self._begin_phase("optimizer")

    def _after_manual_step(self, *_: Any) -> None:
        if not self._in_backward:
            self._begin_phase("forward")

    def _training_step(self, training_step: Any, *args: Any) -> Any:
        # Also where on_oom="retry" repeats it in the midst of a backward pass.
        self._begin_phase("forward")
        return training_step(*args)

    def _begin_phase(self, phase: Phase) -> None:
        if self._step is not None and self.places is not None:
            self.places.phase = phase


def metrics_of(step: StepMemory, device: torch.device) -> dict[str, float | Tensor]:
    """What is logged of a step, in GiB: the same on every rank, each number that of the fullest.

    Args:
        step: this rank's. All ranks have to call this at the same time.
        device: for the exchange with other ranks.
    """
    values = {
        "peak_memory_gib": step.peak,
        **{f"peak_memory_{phase}_gib": step.phases.get(phase, 0) for phase in PHASES},
        "allocated_memory_gib": step.allocated or 0,
        "reserved_memory_gib": step.reserved or 0,
    }
    gib = {name: value / 2**30 for name, value in values.items()}
    if num_ranks() > 1:
        # One exchange for all of them, whichever this rank has; nobody waits for the device to read them.
        largest = torch.tensor(list(gib.values()), device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return {name: largest[i] for i, name in enumerate(gib) if gib[name] > 0}
    return {name: value for name, value in gib.items() if value > 0}
