"""Seconds, bytes, matmuls and errors of one forward and backward pass."""

from __future__ import annotations

import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.matmuls import Matmuls, inside

# Forward and backward: leaves gradients in ``.grad`` and returns what forward computed; None if it is no real pass.
Step = Callable[[], Tensor | None]

_PIECE = 2**24  # numbers of a tensor that are compared at once


@dataclass(frozen=True)
class Cost:
    """What a step takes, apart from time.

    Attributes:
        peak_bytes: the most bytes that were allocated at once, beyond what was there before.
        multiply_adds: in matrix products that torch's own operators compute; kernels of others are not seen.
    """

    peak_bytes: int
    multiply_adds: int


def forget_gradients(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        tensor.grad = None


def seconds(steps: dict[str, Step], leaves: Sequence[Tensor], *, budget: float, runs: int) -> dict[str, list[float]]:
    """Times of each step, in seconds. Warm up before.

    The steps take turns, so that a machine that speeds up or slows down does so for all of them.

    Args:
        steps: by name.
        leaves: whose gradients are dropped before each run.
        budget: seconds after which no new round begins; there is at least one.
        runs: the most rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.perf_counter()
    while not times or len(next(iter(times.values()))) < runs:
        for name, step in steps.items():
            forget_gradients(leaves)
            wait()
            start = time.perf_counter()
            step()
            wait()
            times[name].append(time.perf_counter() - start)
        if not times or time.perf_counter() - begin > budget:
            break
    return times


def cost(step: Step, leaves: Sequence[Tensor]) -> tuple[Cost, Tensor | None]:
    """Runs a step once under torch's profiler; returns what it took, and what it returned.

    The profiler sees what kernels and custom operators allocate, which a dispatch mode does not.
    """
    device = leaves[0].device
    forget_gradients(leaves)
    before = 0
    if device.type == "cuda":
        gc.collect()  # What is freed during the step would be missing from its peak. A trace counts by itself.
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=device.type == "cpu", record_shapes=True) as run:
        with Matmuls() as matmuls:
            result = step()
        wait()
    events = _events(run)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else _peak_bytes(events)
    return Cost(peak, matmuls.multiply_adds + inside(events, matmuls.opaque)), result


def errors(actual: dict[str, list[Tensor]], expected: dict[str, list[Tensor]]) -> dict[str, float]:
    """Frobenius norm of the difference over that of what is expected, over all tensors of a name."""
    return {name: _distance(actual[name], tensors) for name, tensors in expected.items()}


def _distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    off = whole = 0.0
    for mine, theirs in zip(actual, expected, strict=True):
        # In pieces: a copy in fp64 may not fit beside the two.
        for a, e in zip(mine.detach().reshape(-1).split(_PIECE), theirs.reshape(-1).split(_PIECE), strict=True):
            here = e.to(a.device)
            off += float((a.double() - here).square().sum())
            whole += float(here.square().sum())
    return math.sqrt(off / whole)


def wait() -> None:
    """Until the GPU has done all it was asked to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _events(run: torch.profiler.profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        run.export_chrome_trace(str(file))
        return json.loads(file.read_text(encoding="utf-8"))["traceEvents"]


def _peak_bytes(events: list[dict[str, Any]]) -> int:
    """The highest sum of what was allocated and freed up to a moment; frees of what was there before don't count."""
    changes = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    live = peak = 0
    for change in sorted(changes, key=lambda event: event["ts"]):
        live += change["args"]["Bytes"]
        peak = max(peak, live)
    return peak
