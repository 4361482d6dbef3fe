"""What deferred logits answer to torch functions: a table of handlers.

Each handler takes the function itself and the call's arguments. It returns the answer, or ``NotImplemented`` where
only the real logits can give it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

HANDLERS: dict[Any, Callable[..., Any]] = {}
_ANY_PLACE: set[Any] = set()


def is_deferred(value: object) -> bool:
    """Whether a value is a tensor of deferred logits."""
    return isinstance(value, Tensor) and hasattr(value, "_expression")


def handles(*funcs: Any, any_place: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a handler.

    Args:
        funcs: the torch functions that it answers.
        any_place: whether the deferred logits may be any argument, instead of the first.
    """

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        HANDLERS.update(dict.fromkeys(funcs, handler))
        if any_place:
            _ANY_PLACE.update(funcs)
        return handler

    return register


def both(*names: str) -> list[Any]:
    """The functions of these names in ``torch`` and the methods of ``torch.Tensor``, whichever exist."""
    owners = (torch, torch.Tensor)
    return [getattr(owner, name) for name in names for owner in owners if hasattr(owner, name)]


def answer(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What deferred logits among the arguments answer to a torch function; ``NotImplemented`` if nothing."""
    handler = HANDLERS.get(func)
    if handler is None or not (func in _ANY_PLACE or (args and is_deferred(args[0]))):
        return NotImplemented
    try:
        inspect.signature(handler).bind(func, *args, **kwargs)
    except TypeError:
        # A spelling that the handler doesn't know; the real function will know whether it is right.
        return NotImplemented
    return handler(func, *args, **kwargs)


def class_is_last(logits: Any) -> bool:
    """Whether the vocabulary is the last dimension."""
    return logits._class_dim == len(logits._meta.shape) - 1


def is_class_dim(logits: Any, dim: Any) -> bool:
    """Whether a dimension, counted from either end, is the vocabulary."""
    dims = len(logits._meta.shape)
    return isinstance(dim, int) and -dims <= dim < dims and dim % dims == logits._class_dim
