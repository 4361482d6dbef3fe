"""Whether a training step fits a device's memory, by trying it or by predicting it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_mst.experiments.subject import Subject
from lightning_mst.memory.devices import DEVICES
from lightning_mst.program.errors import ConfigurationError, configuration_of
from lightning_mst.program.plan_config import total_memory
from lightning_mst.program.plan_measure import run_steps
from lightning_mst.training.out_of_memory import is_out_of_memory
from lightning_mst.units import parse_bytes

__all__ = ["Fitting", "budget_of", "limited_to", "measured_peak"]


class Fitting:
    """Which of a run's steps fit a device.

    Measured on a GPU, torch's allocator is held to what a device of that size would leave it, so that its fragments
    count. On a CPU the bytes of tensors are counted, and a step runs whatever they are.

    Args:
        subject: The run.
        budget: The device's memory, in bytes.
    """

    def __init__(self, subject: Subject, budget: int) -> None:
        self.subject = subject
        self.budget = budget
        self._peaks: dict[tuple[int, int], int | None] = {}

    def peak(self, batch_size: int, sequence_length: int) -> int | None:
        """Bytes of tensors at the peak of a step on a batch (B, S); None if it does not fit. Each is tried once."""
        key = batch_size, sequence_length
        if key not in self._peaks:
            self._peaks[key] = self._tried(*key) if self.subject.how == "measured" else self._predicted(*key)
        return self._peaks[key]

    def fits(self, batch_size: int, sequence_length: int) -> bool:
        """Whether a step does."""
        return self.peak(batch_size, sequence_length) is not None

    def _tried(self, batch_size: int, sequence_length: int) -> int | None:
        with limited_to(self.budget, self.subject.device):
            peak = measured_peak(self.subject, batch_size, sequence_length)
        return peak if peak is not None and peak <= self.budget else None

    def _predicted(self, batch_size: int, sequence_length: int) -> int | None:
        prediction = self.subject.predict(batch_size, sequence_length)
        return prediction.tensors if prediction.total <= self.budget else None


def budget_of(memory: str | int | None, subject: Subject) -> int:
    """The bytes that a run may take.

    Args:
        memory: What ``task.memory`` says: such as ``"80GiB"``, or None for the memory of the GPU that is here.
        subject: The run.

    Returns:
        Bytes; no more than there are, where the run is measured on a GPU.

    Raises:
        ConfigurationError: It is no amount of memory, or there is no GPU whose memory could be asked for.
    """
    there = total_memory(subject.device.type)
    if memory is None and there is None:
        raise ConfigurationError("task.memory: No GPU was found to ask for its memory. Say, for example, 80GiB")
    sizes = [there[0]] if there is not None and (memory is None or subject.how == "measured") else []
    with configuration_of("task.memory"):
        sizes += [parse_bytes(memory)] if memory is not None else []
    return min(sizes)


def measured_peak(subject: Subject, batch_size: int, sequence_length: int) -> int | None:
    """The peak of a real step with random tokens, in bytes of tensors; None if memory ran out."""
    run = subject.run
    try:
        step = subject.setting.step(sequence_length, batch_size)
        return run_steps(run.build_model, run.training, step, subject.mst, subject.device).tensors
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        release(subject.device)


def release(device: torch.device) -> None:
    """Leaves the memory to the next try as this one found it: a rewritten model is a cycle, which waits for a sweep."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def limited_to(budget: int, device: torch.device) -> Iterator[None]:
    """Lets torch's allocator hold no more than a GPU with so many bytes would leave it; on a CPU, does nothing."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.memory.get_per_process_memory_fraction()
    share = (budget - DEVICES["cuda"].overhead) / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(before, max(0.0, share)))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before)
