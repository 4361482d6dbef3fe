"""What all tensors share that have computed nothing yet and know how to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Local:
    """Answers tensor parallelism's hooks, which take every output for a ``DTensor``: it is whole on every rank."""

    placements = None

    def redistribute(self, *_: Any, **__: Any) -> Any:
        """Itself, whatever the placements."""
        return self

    def to_local(self) -> Any:
        """Itself."""
        return self


class DeferredTensor(Local, torch.Tensor):
    """A tensor without values. A subclass says what it answers to torch functions and how to compute itself."""

    def real(self) -> Tensor:
        """The real tensor: computed at the first call and kept."""
        raise NotImplementedError

    @classmethod
    def respond(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a torch function gives that has such a tensor among its arguments."""
        raise NotImplementedError

    @classmethod
    @torch.compiler.disable
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See ``respond``; torch.compile breaks its graph here."""
        return cls.respond(func, args, dict(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answers code that comes from below Python, such as autograd's own, with the real tensor."""
        args, kwargs = tree_map_only(DeferredTensor, lambda t: t.real(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:
        """Shape and dtype; printing the values would compute them."""
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def without_values(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The answer to a function that asks for a shape, a dtype or the like."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def input_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments by position, with one named ``input`` taken out of ``kwargs`` to be the first."""
    return (kwargs.pop("input"),) if not args and "input" in kwargs else args
