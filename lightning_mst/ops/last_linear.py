"""Skipping the last matmul of a recomputation.

To differentiate ``y = down(inner(x))`` one needs the input of ``down``, never ``y`` itself. When a chunk is recomputed
for its gradient, running its last linear layer is therefore a matmul for nothing: one of three in a gated MLP. Which
call is the last is observed in the forward pass instead of assumed from the block's structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from lightning_mst.ops.context import AutocastState
from lightning_mst.ops.metadata import needs_no_values


class FindLastLinear(TorchFunctionMode):
    """Watches one run of a block and tells which of its ``F.linear`` calls gives the block's output."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = 0
        self._last: Tensor | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        used = not needs_no_values(func) and any(t is self._last for t in tree_leaves((args, kwargs)))
        if self._last is not None and used:
            # Somebody reads or changes its value: an in-place activation, a forward hook.
            self._last = None
        result = func(*args, **kwargs)
        if func is F.linear:
            self._calls += 1
            self._last = result if is_plain(*args[:2]) else None
        return result

    def index(self, output: object) -> int | None:
        """The position of the call whose result ``output`` is, or ``None`` if the block ends in something else."""
        return self._calls - 1 if output is self._last and self._last is not None else None


class SkipLastLinear(TorchFunctionMode):
    """Replaces one ``F.linear`` call by one that has a gradient and no value."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self._index = index
        self._calls = 0
        self.skipped: Tensor | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear:
            self._calls += 1
            if self._calls - 1 == self._index:
                self.skipped = linear_without_value(*args, **(kwargs or {}))
                return self.skipped
        return func(*args, **(kwargs or {}))


def is_plain(input: Tensor, weight: Tensor) -> bool:
    """Whether a linear layer's tensors are plain: quantized, sharded and other wrapped ones have their own matmuls."""
    return not (is_traceable_wrapper_subclass(input) or is_traceable_wrapper_subclass(weight))


def linear_without_value(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with a gradient but no value: right in shape and dtype, and nobody may read it."""
    # Without memory, too.
    return _linear_of(lambda like: like.new_empty(()).expand(_result_shape(like, weight)), input, weight, bias)


def linear_of_value(value: Tensor | None, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` whose value is known, or not read.

    Args:
        value: (..., D_out), the result; ``None`` where it is only written to.
        input: (..., D).
        weight: (D_out, D).
        bias: (D_out).

    Returns:
        A copy of ``value``, with the gradients of a linear layer.
    """

    def answer(like: Tensor) -> Tensor:
        # Memory of its own, as some layers go on in place.
        return like.new_empty(_result_shape(like, weight)) if value is None else value.to(like.dtype, copy=True)

    return _linear_of(answer, input, weight, bias)


def _result_shape(input: Tensor, weight: Tensor) -> tuple[int, ...]:
    return (*input.shape[:-1], weight.shape[0])


def _linear_of(answer: Callable[[Tensor], Tensor], input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    autocast = AutocastState.now(input.device)
    return _LinearOfValue.apply(
        answer, autocast.cast(input), autocast.cast(weight), None if bias is None else autocast.cast(bias)
    )


class _LinearOfValue(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, answer: Callable[[Tensor], Tensor], input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        # What no gradient needs is not kept: of a frozen layer neither.
        _, need_input, need_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(input if need_weight else None, weight if need_input else None)
        return answer(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        _, need_input, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])  # (..., D_out) -> (tokens, D_out)
        with AutocastState.now(grad.device).disabled():
            return (
                None,
                grad @ weight if need_input else None,
                rows.t() @ input.reshape(-1, input.shape[-1]) if need_weight else None,
                rows.sum(0) if need_bias else None,
            )
