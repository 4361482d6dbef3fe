"""Counting the multiply-adds of matrix products."""

from __future__ import annotations

import math
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# The places of the two factors among an operator's inputs.
_FACTORS = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "addmm_": (1, 2),
    "baddbmm": (1, 2),
    "baddbmm_": (1, 2),
}


class Matmuls(TorchDispatchMode):
    """Counts the matrix products of torch's own operators while the mode is on.

    Kernels, not calls, are counted: a recomputation may stop on the way into its last product.

    Attributes:
        multiply_adds: so far.
        opaque: the names of other operators that ran, into which a mode can't see.
    """

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0
        self.opaque: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace not in ("aten", "prim"):
            self.opaque.add(func.name().partition(".")[0])
        elif name in _FACTORS:
            left, right = (args[place].shape for place in _FACTORS[name])
            self.multiply_adds += math.prod(left) * right[-1]
        elif name == "linear":  # without a graph it comes whole
            self.multiply_adds += args[0].numel() * args[1].shape[0]
        return result


def inside(events: list[dict[str, Any]], operators: set[str]) -> int:
    """The multiply-adds in calls of these operators.

    Args:
        events: of a profiler's trace with the shapes of inputs.
        operators: their names, such as ``"library::operator"``.
    """
    calls = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] in operators and "dur" in e]
    total = 0
    for event in events:
        name = event["name"].removeprefix("aten::")
        if name in _FACTORS and any(start <= event["ts"] < end for start, end in calls):
            left, right = (event["args"]["Input Dims"][place] for place in _FACTORS[name])
            total += math.prod(left) * right[-1]
    return total
