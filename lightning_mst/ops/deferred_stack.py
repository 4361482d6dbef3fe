"""Deferred logits stacked along a new first dimension, for what reduces that dimension again at once.

Mixtures of models are written so: ``torch.stack([log_p, log_q]).logsumexp(0)``. The result is deferred logits. Anything
else gets a real stack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_mst.ops.deferred_functions import recorded
from lightning_mst.ops.deferred_table import both, handles, is_deferred
from lightning_mst.ops.deferred_tensor import DeferredTensor, input_first, without_values
from lightning_mst.ops.metadata import needs_no_values

_REDUCTIONS = {func: func.__name__ for func in both("amax", "amin", "logsumexp", "mean", "sum")}


class DeferredStack(DeferredTensor):
    """``torch.stack`` of deferred logits. Made by that function."""

    _parts: tuple[Any, ...]
    _real: Tensor | None

    @staticmethod
    def __new__(cls, parts: tuple[Any, ...]) -> DeferredStack:
        """Makes the tensor from at least one deferred logits of one shape and dtype."""
        meta = parts[0]._meta
        result = torch.Tensor._make_wrapper_subclass(
            cls,
            (len(parts), *meta.shape),
            dtype=meta.dtype,
            device=meta.device,
            requires_grad=any(part._meta.requires_grad for part in parts),
        )
        result._parts, result._real = parts, None
        return result

    def real(self) -> Tensor:
        """The real stack: computed at the first call and kept."""
        if self._real is None:
            self._real = torch.stack([part.real(asked_by="stack") for part in self._parts])
        return self._real

    @classmethod
    def respond(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answers a reduction of the new dimension without values; needs the real stack for any other."""
        args = input_first(args, kwargs)
        stack = args[0] if args else None
        if isinstance(stack, DeferredStack) and stack._real is None:
            if needs_no_values(func):
                return without_values(func, args, kwargs)
            if func in _REDUCTIONS and (args[1:], kwargs) in (((0,), {}), ((), {"dim": 0})):
                plain = getattr(torch, _REDUCTIONS[func])
                result = recorded(lambda *rows: plain(torch.stack(rows), 0), stack._parts, {})
                if result is not NotImplemented:
                    return result
        args, kwargs = tree_map_only(DeferredStack, lambda t: t.real(), (args, kwargs))
        return func(*args, **kwargs)


@handles(torch.stack, any_place=True)
def _stack(func: Any, tensors: Any, dim: int = 0) -> Any:
    if dim != 0 or not all(is_deferred(part) for part in tensors):
        return NotImplemented
    metas = {(part._meta.shape, part._meta.dtype, part._class_dim) for part in tensors}
    return DeferredStack(tuple(tensors)) if len(metas) == 1 else NotImplemented
