"""Seconds and bytes of one forward and backward pass."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

from torch import Tensor

from lightning_mst.memory import TensorBytes

Step = Callable[[], Tensor]


def seconds(steps: dict[str, Step], repetitions: int) -> dict[str, float]:
    """The median time of each step, forward and backward. Warm up before.

    The steps take turns, so that a machine that speeds up or slows down does so for all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repetitions):
        for name, step in steps.items():
            start = time.perf_counter()
            step().backward()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(step: Step, inputs: list[Tensor]) -> int:
    """The most bytes of tensors alive at once during forward and backward, beyond the inputs."""
    for tensor in inputs:
        tensor.grad = None
    gc.collect()
    with TensorBytes(inputs) as tracker:
        step().backward()
    return tracker.peak
