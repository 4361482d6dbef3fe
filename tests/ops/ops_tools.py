"""Shared by the tests of the ops: distances, a count of matmuls, and a head in both forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mst.ops import LinearHead
from lightning_mst.ops.deferred_logits import DeferredLogits, defer_logits

B, S, D, V = 2, 5, 6, 11
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def distance(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    actual, expected = actual.detach().double(), expected.detach().double()
    norm = expected.norm().item()
    return (actual - expected).norm().item() / (norm if norm > 0 else 1.0)


def assert_close(actual: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """Tensors or sequences of tensors and ``None``: same places empty, same shapes and dtypes, small distances."""
    if isinstance(expected, Tensor):
        actual, expected = [actual], [expected]
    assert len(actual) == len(expected), what
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a is None) == (e is None), f"{what}[{index}]: got {a}, expected {e}"
        if e is None:
            continue
        assert a.shape == e.shape, f"{what}[{index}]: got {a.shape}, expected {e.shape}"
        assert a.dtype == e.dtype, f"{what}[{index}]: got {a.dtype}, expected {e.dtype}"
        # Written so that nan fails.
        assert distance(a, e) <= tolerance, f"{what}[{index}]: off by {distance(a, e):.3g}, allowed {tolerance:.3g}"


def total_distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return sum(distance(a, e) for a, e in zip(actual, expected, strict=True))


class Matmuls(TorchDispatchMode):
    """Counts the multiply-adds of matrix products, those with ``out=`` and in-place ones included."""

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            left, right = args[:2]
        elif name in ("addmm", "addmm_", "baddbmm", "baddbmm_"):
            left, right = args[1:3]
        elif name == "linear":
            left, right = args[0], args[1].t()
        else:
            return result
        self.multiply_adds += left.numel() * right.shape[-1]
        return result


class Head:
    """The tensors of one head, and its logits in both forms."""

    def __init__(
        self, dtype: torch.dtype = torch.float64, *, bias: bool = True, lead: tuple[int, ...] = (B, S)
    ) -> None:
        def leaf(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()

        self.hidden, self.weight = leaf(*lead, D), leaf(V, D)
        self.bias = leaf(V) if bias else None
        self.labels = torch.randint(V, lead)
        self.labels.view(-1)[::4] = -100
        self.tensors = [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def plain(self) -> Tensor:
        return F.linear(self.hidden, self.weight, self.bias)

    def deferred(self, num_chunks: int = 3) -> DeferredLogits:
        return defer_logits(self.hidden, LinearHead(self.weight, self.bias), split={"num_chunks": num_chunks})

    def outcome(self, use: Callable[[Tensor, Tensor], Tensor], logits: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        result = use(logits, self.labels)
        incoming = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype).view(result.shape)
        return result.detach(), torch.autograd.grad(result, self.tensors, incoming)


def leaves_of(node: Any) -> set[int]:
    """The ids of the leaves that a graph leads to."""
    todo, seen, found = [node], set(), set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo.extend(parent for parent, _ in node.next_functions)
    return found
