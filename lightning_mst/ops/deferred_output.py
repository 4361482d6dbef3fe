"""The output of a token-wise block, before it is computed, so that what comes next can join the block.

Some blocks are no module: a layer calls ``fc2(act(fc1(x)))`` in its own forward. Others are followed by a norm that
would keep their output for backward. Here the first part answers with a tensor that has computed nothing. Pointwise
work on it is written down; the part that ends the block finds in it all that it needs to run everything over
mini-sequences. Whoever else looks at it gets the real output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_mst.ops.deferred_table import both
from lightning_mst.ops.deferred_tensor import DeferredTensor, without_values
from lightning_mst.ops.metadata import needs_no_values

Finish = Callable[[Tensor], Tensor]
Run = Callable[[Finish, Iterable[Tensor]], Tensor]
"""Runs a block over mini-sequences with one more function at its end, and that function's parameters."""


@dataclass(eq=False)
class _Step:
    """One function and its arguments, among which earlier steps may be; without a function, the block's own output."""

    function: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    def of(self, output: Tensor) -> Tensor:
        """What the step gives for some of the tokens."""
        return self._value({_OUTPUT: output}) if self.function else output

    def _value(self, known: dict[Any, Tensor]) -> Tensor:
        if self.function is None:
            return known[_OUTPUT]
        if self not in known:
            args, kwargs = tree_map_only(_Step, lambda step: step._value(known), (self.args, dict(self.kwargs or {})))
            known[self] = self.function(*args, **kwargs)
        return known[self]


_OUTPUT = object()


class DeferredOutput(DeferredTensor):
    """A block's output, or a pointwise function of it, computed when ``finish`` or somebody else needs it."""

    _run: Run
    _step: _Step
    _real: Tensor | None
    _has_graph: bool

    @staticmethod
    def __new__(cls, run: Run, step: _Step, shape: torch.Size, dtype: torch.dtype, device: Any) -> DeferredOutput:
        """Makes the tensor; ``defer_output`` is the way to call this."""
        result = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        result._run, result._step, result._real, result._has_graph = run, step, None, False
        return result

    @property
    def was_computed(self) -> bool:
        """Whether somebody has asked for the real output."""
        return self._real is not None

    def finish(self, function: Finish, parameters: Iterable[Tensor]) -> Tensor:
        """Runs the block, the pointwise work and one more token-wise function over mini-sequences.

        Args:
            function: from (..., I) to (..., D_out), for each token by itself.
            parameters: what ``function`` uses and may need a gradient.

        Returns:
            (\\*lead, D_out).
        """
        if self._real is not None:
            return function(self.real())
        step = self._step  # and not self: what the chunks' function refers to lives until backward
        return self._run(lambda output: function(step.of(output)), parameters)

    def real(self) -> Tensor:
        """The output, of all tokens; computed at the first call, and at the first with a graph, and kept."""
        if self._real is None or (torch.is_grad_enabled() and not self._has_graph):
            self._has_graph = torch.is_grad_enabled()
            self._real = self._run(self._step.of, ())
        return self._real

    @classmethod
    def respond(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Writes pointwise work down; anything else gets the real output."""
        if needs_no_values(func):
            return without_values(func, args, kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        subject = next(t for t in tensors if isinstance(t, DeferredOutput))
        if func in _POINTWISE and all(_is_of_same_block(t, subject) for t in tensors):
            return subject._after(func, args, kwargs)
        args, kwargs = tree_map_only(DeferredOutput, lambda t: t.real(), (args, kwargs))
        return func(*args, **kwargs)

    def _after(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> DeferredOutput:
        in_place = bool(kwargs.pop("inplace", False))
        noted_args, noted_kwargs = tree_map_only(DeferredOutput, lambda t: t._step, (args, kwargs))
        step = _Step(func, noted_args, noted_kwargs)
        if in_place:
            self._step = step
            return self
        with torch._C.DisableTorchFunctionSubclass():
            shape, dtype, device = self.shape, self.dtype, self.device
        example = torch.empty(1, dtype=dtype, device=device)
        like_args, like_kwargs = tree_map_only(DeferredOutput, lambda _: example, (args, kwargs))
        with torch.no_grad():
            dtype = func(*like_args, **like_kwargs).dtype
        return DeferredOutput(self._run, step, shape, dtype, device)


def defer_output(run: Run, shape: Iterable[int], dtype: torch.dtype, device: Any) -> DeferredOutput:
    """The output of a block, to be computed when and as far as something needs it.

    Args:
        run: runs the block over mini-sequences, with a function at its end that turns a part of the output, (..., I),
            into what is wanted of it, and that function's parameters.
        shape: the output's, (\\*lead, I).
        dtype: the output's.
        device: the output's.
    """
    return DeferredOutput(run, _Step(), torch.Size(shape), dtype, device)


def _is_of_same_block(tensor: Tensor, subject: DeferredOutput) -> bool:
    if isinstance(tensor, DeferredOutput):
        return tensor._run is subject._run and tensor._real is None
    return tensor.dim() == 0 and not tensor.requires_grad


_POINTWISE = set(
    both(
        "abs", "add", "clamp", "clamp_max", "clamp_min", "div", "erf", "exp", "mul", "multiply", "neg", "pow", "relu",
        "rsub", "sigmoid", "sqrt", "square", "sub", "tanh", "true_divide",
        "__add__", "__mul__", "__neg__", "__pow__", "__radd__", "__rmul__", "__rsub__", "__rtruediv__", "__sub__",
        "__truediv__", "to", "type_as", "float", "double", "half", "bfloat16", "contiguous",
    )
) | {
    getattr(F, name)
    for name in (
        "celu", "dropout", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish",
        "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh",
    )
}  # fmt: skip
