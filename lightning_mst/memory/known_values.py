"""Integers that keep their values among fake tensors: which labels count depends on the labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

_READ = torch.ops.aten._local_scalar_dense.default


class KnownValues(TorchDispatchMode):
    """Computes for real what follows from integer tensors whose values are given, beside their fake twins.

    A batch of tokens takes a few megabytes however long it is, so that labels can be real where all else is fake.
    A number that is read from other floating-point tensors (``item()``), such as a norm in an optimizer, is 1: it has
    no part in the shape of anything.

    Args:
        fake: the mode in which all else runs; enter it before this one.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake
        self._values = WeakIdKeyDictionary()

    def give(self, values: Tensor) -> Tensor:
        """A fake twin of an integer tensor, whose values are remembered."""
        with unset_fake_temporarily():
            own = values.detach().clone()
        twin = self._fake.from_tensor(own)
        self._values[twin] = own
        return twin

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs an operator on the fake tensors, and on the values as well if all of them are known."""
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0] not in self._values and func is not _READ:
            return func(*args, **kwargs)  # as for most
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not tensors or not all(t in self._values for t in tensors):
            if func is _READ and tensors[0].is_floating_point():
                return 1.0
            return func(*args, **kwargs)
        real_args, real_kwargs = tree_map(self._value, (args, kwargs))
        with unset_fake_temporarily():
            real = func(*real_args, **real_kwargs)
        try:
            result = func(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            result = tree_map(lambda t: self._fake.from_tensor(t) if isinstance(t, Tensor) else t, real)
        for twin, value in zip(tree_leaves(result), tree_leaves(real), strict=True):
            if isinstance(twin, Tensor) and not value.is_floating_point():
                self._values[twin] = value
        return result

    def _value(self, entry: Any) -> Any:
        return self._values[entry] if isinstance(entry, Tensor) else entry


def is_integer(tensor: Tensor) -> bool:
    """Whether a tensor holds integers or truth values."""
    return not (tensor.is_floating_point() or tensor.is_complex())


__all__ = ["KnownValues", "is_integer"]
