"""Skipping the last matmul of a recomputation.

To differentiate ``y = down(inner(x))`` one needs the input of ``down``, never ``y`` itself. When a chunk is recomputed
for its gradient, running its last linear layer is therefore a matmul for nothing: one of three in a gated MLP. Which
call is the last is observed in the forward pass instead of assumed from the block's structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import nan
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
    """Watches one run of a block and tells which of its linear layers gives the block's output."""

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
        linear = as_linear(func, args, kwargs)
        result = func(*args, **(kwargs or {}))
        if linear is not None:
            self._calls += 1
            self._last = result if is_plain(*linear[:2]) else None
        elif self._last is not None and _passes_on(func, args, kwargs, self._last):
            self._last = result
        elif not needs_no_values(func) and any(t is self._last for t in tree_leaves((args, kwargs or {}))):
            # Somebody reads or changes its value: an in-place activation, a forward hook.
            self._last = None
        return result

    def index(self, output: object) -> int | None:
        """The position of the call whose result ``output`` is, or ``None`` if the block ends in something else."""
        return self._calls - 1 if output is self._last and self._last is not None else None


class SkipLastLinear(TorchFunctionMode):
    """Replaces one linear layer's call by one that has a gradient and no value."""

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
        linear = as_linear(func, args, kwargs)
        if linear is not None:
            self._calls += 1
            if self._calls - 1 == self._index:
                self.skipped = linear_without_value(*linear)
                return self.skipped
        result = func(*args, **(kwargs or {}))
        if self.skipped is not None and _passes_on(func, args, kwargs, self.skipped):
            self.skipped = result
        return result


def _passes_on(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, result: Tensor
) -> bool:
    """Whether a function of a linear layer's result can be differentiated without its value: dropout, another shape."""
    if func not in (Tensor.view, Tensor.reshape, F.dropout) or not args or args[0] is not result:
        return False
    return not (func is F.dropout and ((len(args) > 3 and args[3]) or (kwargs or {}).get("inplace")))


def as_linear(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """The (input, weight, bias) of ``F.linear`` for a call of a torch function that computes the same, or ``None``."""
    options = dict(kwargs or {})
    if func is F.linear:
        bias = args[2] if len(args) > 2 else options.get("bias")
        input = args[0] if args else options["input"]
        return input, args[1] if len(args) > 1 else options["weight"], bias
    # GPT-2's layers, whose weights are (D, D_out).
    if func is torch.addmm and len(args) == 3 and not options and args[0].dim() == 1:
        return args[1], args[2].t(), args[0]
    return None


def is_plain(input: Tensor, weight: Tensor) -> bool:
    """Whether a linear layer's tensors are plain: quantized, sharded and other wrapped ones have their own matmuls."""
    return not (is_traceable_wrapper_subclass(input) or is_traceable_wrapper_subclass(weight))


def linear_without_value(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with a gradient but no value: right in shape and dtype, and nobody may read it."""
    # Without memory, too.
    return _linear_of(lambda like: like.new_full((), nan).expand(_result_shape(like, weight)), input, weight, bias)


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
        # Memory of its own, as some layers go on in place; not a number, so that who reads it after all is found out.
        shape = _result_shape(like, weight)
        return like.new_full(shape, nan) if value is None else value.to(like.dtype, copy=True)

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
