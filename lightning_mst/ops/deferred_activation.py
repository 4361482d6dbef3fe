"""The inner activation of an MLP whose two projections stand in a layer by themselves.

Such a layer calls ``fc2(act(fc1(x)))`` in its own forward, so there is no block to run over mini-sequences. Here
``fc1`` answers with a tensor that has computed nothing: pointwise work on it is written down, and ``fc2`` finds in it
all that it needs to run the three over mini-sequences. Whoever else looks at it gets the real activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_mst.ops.context import AutocastState
from lightning_mst.ops.metadata import needs_no_values
from lightning_mst.ops.token_wise import token_wise


@dataclass(eq=False)
class _Step:
    """One function and its arguments, among which earlier steps may be; without a function, the projection of x."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    def value(self, x: Tensor, known: dict[_Step, Tensor]) -> Tensor:
        """What the step gives for some of the tokens."""
        if self not in known:
            if self.kwargs is None:
                known[self] = self.function(x)
            else:
                args, kwargs = tree_map_only(_Step, lambda s: s.value(x, known), (self.args, dict(self.kwargs)))
                known[self] = self.function(*args, **kwargs)
        return known[self]


class DeferredActivation(torch.Tensor):
    """A pointwise function of ``project(x)`` that is computed when ``finish`` or somebody else needs it."""

    _x: Tensor  # (*lead, D)
    _parameters: tuple[Tensor, ...]
    _num_chunks: int
    _step: _Step
    _real: Tensor | None

    @staticmethod
    def __new__(
        cls,
        x: Tensor,
        step: _Step,
        *,
        width: int,
        dtype: torch.dtype,
        parameters: tuple[Tensor, ...],
        num_chunks: int,
    ) -> DeferredActivation:
        """Makes the tensor; ``defer_activation`` is the way to call this."""
        result = torch.Tensor._make_wrapper_subclass(cls, (*x.shape[:-1], width), dtype=dtype, device=x.device)
        result._x, result._step, result._parameters = x, step, parameters
        result._num_chunks, result._real = num_chunks, None
        return result

    @property
    def was_computed(self) -> bool:
        """Whether somebody has asked for the real activation."""
        return self._real is not None

    def finish(self, project: Callable[[Tensor], Tensor], parameters: Iterable[Tensor]) -> Tensor:
        """Runs the first projection, the pointwise work and a second projection over mini-sequences.

        Args:
            project: from (tokens, I) to (tokens, D_out).
            parameters: what ``project`` uses and may need a gradient.

        Returns:
            (\\*lead, D_out).
        """
        if self._real is not None:
            return project(self._real)
        step = self._step  # and not self, which would keep x until backward, unknown to checkpointing
        return token_wise(
            lambda part: project(step.value(part, {})),
            self._x,
            num_chunks=self._num_chunks,
            parameters=[*self._parameters, *parameters],
        )

    def real(self) -> Tensor:
        """The activation, of all tokens; computed at the first call and kept."""
        if self._real is None:
            self._real = self._step.value(self._x, {})
        return self._real

    @classmethod
    @torch.compiler.disable
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Writes pointwise work down; anything else gets the real activation."""
        kwargs = dict(kwargs or {})
        if needs_no_values(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        subject = next(t for t in tensors if isinstance(t, DeferredActivation))
        if func in _POINTWISE and all(_is_same_tokens(t, subject) for t in tensors):
            return subject._after(func, args, kwargs)
        args, kwargs = tree_map_only(DeferredActivation, lambda t: t.real(), (args, kwargs))
        return func(*args, **kwargs)

    def _after(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> DeferredActivation:
        in_place = bool(kwargs.pop("inplace", False))
        noted_args, noted_kwargs = tree_map_only(DeferredActivation, lambda t: t._step, (args, kwargs))
        step = _Step(func, noted_args, noted_kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            width, dtype, device = self.shape[-1], self.dtype, self.device
        if in_place:
            self._step = step
            return self
        like = tree_map_only(
            DeferredActivation, lambda t: torch.empty(1, dtype=dtype, device=device), (args, {**kwargs})
        )
        with torch.no_grad():
            dtype = func(*like[0], **like[1]).dtype
        return DeferredActivation(
            self._x, step, width=width, dtype=dtype, parameters=self._parameters, num_chunks=self._num_chunks
        )

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answers code from below Python with the real activation."""
        args, kwargs = tree_map_only(DeferredActivation, lambda t: t.real(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:
        """Shape and dtype; printing the values would compute them."""
        return f"DeferredActivation(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def defer_activation(
    project: Callable[[Tensor], Tensor], x: Tensor, *, width: int, parameters: Iterable[Tensor], num_chunks: int
) -> DeferredActivation:
    """The projection ``project(x)``, to be computed when and as far as something needs it.

    Args:
        project: from (..., D) to (..., I), for each token by itself.
        x: (\\*lead, D).
        width: I.
        parameters: what ``project`` uses and may need a gradient.
        num_chunks: number M of mini-sequences for ``finish``.

    Returns:
        (\\*lead, I), in the dtype that a linear layer would give under the present autocast state.
    """
    dtype = AutocastState.now(x.device).cast(x.new_empty(0)).dtype
    return DeferredActivation(
        x, _Step(project), width=width, dtype=dtype, parameters=tuple(parameters), num_chunks=num_chunks
    )


def _is_same_tokens(tensor: Tensor, subject: DeferredActivation) -> bool:
    if isinstance(tensor, DeferredActivation):
        return tensor._x is subject._x and tensor._real is None
    return tensor.dim() == 0 and not tensor.requires_grad


_NAMES = (
    "abs", "add", "clamp", "clamp_max", "clamp_min", "div", "erf", "exp", "mul", "multiply", "neg", "pow", "relu",
    "rsub", "sigmoid", "sqrt", "square", "sub", "tanh", "true_divide",
    "__add__", "__mul__", "__neg__", "__pow__", "__radd__", "__rmul__", "__rsub__", "__rtruediv__", "__sub__",
    "__truediv__", "to", "type_as", "float", "double", "half", "bfloat16", "contiguous",
)  # fmt: skip
_POINTWISE = {
    getattr(owner, name) for name in _NAMES for owner in (torch, torch.Tensor) if hasattr(owner, name)
} | {
    getattr(F, name)
    for name in (
        "celu", "dropout", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish",
        "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh",
    )
}  # fmt: skip
