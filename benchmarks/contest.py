"""One block, one length: every contestant on the same tensors, in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import Step
from benchmarks.peers import CannotRun

UNMODIFIED = "unmodified"
Values = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Contest:
    """What is measured.

    Attributes:
        block: its name in the tables.
        length: S, the number of tokens.
        leaves: the tensors that get gradients.
        forward_multiply_adds: in the matrix products of one forward pass of the unmodified block: the unit of passes.
        contestants: what builds each step; the unmodified block is among them.
        peers: the same for public implementations, which may be unable to run.
        values: the named results and gradients after a step that returned this tensor.
        expected: the same of the unmodified block in fp64, or ``None`` where that is too large.
    """

    block: str
    length: int
    leaves: list[Tensor]
    forward_multiply_adds: int
    contestants: dict[str, Callable[[], Step]]
    peers: dict[str, Callable[[], Step]]
    values: Callable[[Tensor], Values]
    expected: Callable[[], Values] | None


def hold(contest: Contest, *, budget: float, runs: int) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Measures all contestants; returns rows, and which peers were skipped and why."""
    values = contest.expected() if contest.expected is not None else {}
    # In the host's memory, so that the contestants have all of the device's.
    expected = {name: [tensor.cpu() for tensor in tensors] for name, tensors in values.items()}
    del values
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    skipped: list[dict[str, str]] = []
    for name, build in (contest.contestants | contest.peers).items():
        try:
            step = build()
            rows[name] = _first_run(contest, step, expected)
            steps[name] = step
        except torch.OutOfMemoryError:
            rows[name] = {"peak_bytes": None, "passes": None, "errors": None}
        except CannotRun as reason:
            skipped.append({"block": contest.block, "kind": name, "reason": str(reason)})
        except Exception as error:
            if name not in contest.peers:
                raise
            # What another project's code does here is a result, too.
            first_line = str(error).partition("\n")[0]
            skipped.append({"block": contest.block, "kind": name, "reason": f"{type(error).__name__}: {first_line}"})
        if contest.leaves[0].is_cuda:
            torch.cuda.empty_cache()
    del expected
    times = measure.seconds(steps, contest.leaves, budget=budget, runs=runs)
    measure.forget_gradients(contest.leaves)
    done = []
    for name, row in rows.items():
        own = times.get(name)
        timed = {"seconds": statistics.median(own) if own else None, "runs": len(own) if own else 0}
        done.append({"block": contest.block, "length": contest.length, "kind": name, **timed, **row})
        print(describe(done[-1]), flush=True)
    for entry in skipped:
        print(f"{entry['block']:24} S={contest.length:6} {entry['kind']:30} skipped: {entry['reason']}", flush=True)
    return done, skipped


def _first_run(contest: Contest, step: Step, expected: Values) -> dict[str, Any]:
    """Bytes, passes and errors; warms up for measuring the time."""
    cost, result = measure.cost(step, contest.leaves)
    # Kernels that are not torch's own show no matmuls.
    passes = cost.multiply_adds / contest.forward_multiply_adds or None
    errors = measure.errors(contest.values(result), expected) if expected and result is not None else None
    return {"peak_bytes": cost.peak_bytes, "passes": passes, "errors": errors}


def describe(row: dict[str, Any]) -> str:
    start = f"{row['block']:24} S={row['length']:6} {row['kind']:30}"
    if row["seconds"] is None:
        return f"{start} out of memory"
    passes = "" if row["passes"] is None else f" {row['passes']:5.2f} passes"
    worst = "" if row["errors"] is None else f"  error {max(row['errors'].values()):.1e}"
    return f"{start} {row['seconds']:8.3f} s {row['peak_bytes'] / 2**20:9.1f} MiB{passes}{worst}"
