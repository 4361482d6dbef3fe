"""Projections whose values nobody reads in the backward pass, and those that are kept for it.

To differentiate ``rotary(project(norm(x)))`` one needs what went into the projection, not what came out. Where a chunk
is recomputed for its gradient, the results of such linear layers are not computed again. A result that something after
it reads in the backward pass, as a norm of queries and keys does, is kept from the forward pass instead. Which is which
is found out once, by running the block with other values in the place of a result and looking at what autograd saves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Size, Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_mst.ops.last_linear import as_linear, is_plain, linear_of_value


@dataclass(frozen=True)
class LinearReads:
    """Which linear layers of a block have results that its backward pass reads.

    Attributes:
        shapes: of the weights of the linear layers that one run of the block goes through, (D_out, D) each.
        read: the positions of those whose results are read.
        shown: the positions of those of whose results the block's output is made. They are read where something comes
            after the block that reads its output.
    """

    shapes: tuple[Size, ...]
    read: frozenset[int]
    shown: frozenset[int]

    def with_output_read(self) -> LinearReads:
        """The same for a block that goes on with something that reads its output, as a norm does."""
        return replace(self, read=self.read | self.shown)


def find_linear_reads(block: Callable[..., Any], inputs: Sequence[Tensor]) -> LinearReads:
    """Tries which results of its linear layers a block's backward pass reads.

    Args:
        block: a function of tensors, without random numbers. Whatever it uses should need a gradient: then the answer
            also holds where less does.
        inputs: a few tokens; those that may need a gradient need one.
    """
    counter = _Replace(None)
    _run(block, inputs, counter)
    read, shown = set(), set()
    for index in range(len(counter.shapes)):
        saved, output = _run(block, inputs, _Replace(index))
        # Twice: what is saved may be as coarse as a comparison with zero.
        for seed in (0, 1):
            other_saved, other_output = _run(block, inputs, _Replace(index, seed))
            if _differ(saved, other_saved):
                read.add(index)
            if _differ(output, other_output):
                shown.add(index)
    return LinearReads(tuple(counter.shapes), frozenset(read), frozenset(shown))


class KeepRead(TorchFunctionMode):
    """Takes note of the results that the backward pass will read, in one run of a block.

    Attributes:
        shapes: of the weights of the linear layers that ran.
        kept: by position, the results.
    """

    def __init__(self, read: Collection[int]) -> None:
        super().__init__()
        self._read = read
        self.shapes: list[Size] = []
        self.kept: dict[int, Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        linear = as_linear(func, args, kwargs)
        if linear is not None:
            if len(self.shapes) in self._read and is_plain(*linear[:2]):
                # A copy, as what follows may work in place.
                self.kept[len(self.shapes)] = result.clone()
            self.shapes.append(linear[1].shape)
        return result


class ReplayLinears(TorchFunctionMode):
    """Runs a block again with a graph, its linear layers answering what they answered before, or nothing.

    Args:
        known: by position, the results that are read. The others have a gradient and no value.
    """

    def __init__(self, known: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._known = known
        self._calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        linear = as_linear(func, args, kwargs)
        if linear is None:
            return func(*args, **(kwargs or {}))
        index, self._calls = self._calls, self._calls + 1
        if not is_plain(*linear[:2]):
            return func(*args, **(kwargs or {}))
        return linear_of_value(self._known.get(index), *linear)


class _Replace(TorchFunctionMode):
    """Counts linear layers, and lets one answer with what it is told to: its own result, or random numbers."""

    def __init__(self, index: int | None, seed: int | None = None) -> None:
        super().__init__()
        self._index = index
        self._seed = seed
        self.shapes: list[Size] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        linear = as_linear(func, args, kwargs)
        if linear is None:
            return result
        self.shapes.append(linear[1].shape)
        if len(self.shapes) - 1 != self._index:
            return result
        value = result.detach()
        if self._seed is not None:
            value = torch.randn(value.shape, generator=torch.Generator().manual_seed(self._seed), dtype=value.dtype)
        return linear_of_value(value, *linear)


def _run(
    block: Callable[..., Any], inputs: Sequence[Tensor], mode: TorchFunctionMode
) -> tuple[list[Tensor], list[Tensor]]:
    """What autograd saves in one run, and the output."""
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return tensor

    leaves = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
    with torch.enable_grad(), saved_tensors_hooks(note, lambda tensor: tensor), mode:
        output = block(*leaves)
    return saved, [t.detach() for t in tree_leaves(output)]


def _differ(these: list[Tensor], those: list[Tensor]) -> bool:
    return len(these) != len(those) or not all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(these, those, strict=True)
    )
