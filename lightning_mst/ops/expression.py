"""Expressions over the vocabulary: what is still to be done to the logits of a token, and to what.

An expression is a small tree. Its leaves are the logits of a head (a function of hidden states) and operands with one
row per token; its inner nodes are calls of torch functions that treat every token alike. Its inputs are the hidden
states and the operands, all with the same leading dimensions, so that shape work which leaves the vocabulary alone
applies to them, and the whole can be evaluated for any part of the tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_mst.ops.context import AutocastState
from lightning_mst.ops.heads import Head

Request = Callable[[Tensor, Head], tuple[Tensor, ...]]
"""What is asked of a head: a function of the hidden states (..., D) and the head."""

Run = Callable[[Request, Tensor], tuple[Tensor, ...]]
"""How to ask a head: runs a request on hidden states, with the head's weights at hand."""


@dataclass(frozen=True, eq=False)
class Source:
    """One call of a head. Calls whose ``run`` are equal are asked together.

    Attributes:
        run: how to ask the head.
        split: ``{"num_chunks": M}`` or ``{"chunk_tokens": c}``.
        vocab_size: V.
        autocast: the state in which the head was called.
        weights: its parameters then.
        weight_versions: how often each had been written to.
        hooks: what must run when backward reaches anything computed from the logits.
    """

    run: Run
    split: Mapping[str, int]
    vocab_size: int
    autocast: AutocastState
    weights: tuple[Tensor, ...]
    weight_versions: tuple[int, ...]
    hooks: list[Callable[[Tensor], Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Operand:
    """A tensor with one row per token: the input number ``slot``."""

    slot: int


@dataclass(frozen=True)
class Logits:
    """What a head gives for the hidden states that are the input number ``slot``."""

    slot: int
    source: Source


@dataclass(frozen=True, eq=False)
class Call:
    """A torch function of other nodes and constants, under the autocast state in force when it was written down.

    Attributes:
        fn: takes rows (n, V) or (n, d) for the nodes among its arguments.
        args: nodes, numbers, and tensors that are the same for every token.
        kwargs: the same.
        autocast: the state.
        is_pointwise: whether each entry of the result depends on the entries at the same place alone.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    autocast: AutocastState
    is_pointwise: bool = False

    def values(self) -> Iterator[Any]:
        """All arguments."""
        yield from self.args
        yield from self.kwargs.values()

    def with_values(self, change: Callable[[Any], Any]) -> Call:
        """The same call of changed arguments."""
        args = tuple(change(a) for a in self.args)
        kwargs = {name: change(a) for name, a in self.kwargs.items()}
        return Call(self.fn, args, kwargs, self.autocast, self.is_pointwise)

    @cached_property
    def shared(self) -> frozenset[Node]:
        """The nodes below this one that stand in more than one place."""
        places = Counter(node for node in _walk(self) if isinstance(node, Node))
        return frozenset(node for node, count in places.items() if count > 1)


Leaf = Operand | Logits
Node = Leaf | Call


def detached(node: Node, device: torch.device) -> Call:
    """The node without its gradients."""
    return Call(torch.detach, (node,), {}, AutocastState.now(device), is_pointwise=True)


def _walk(root: Node, *, trained: bool = False) -> Iterator[Any]:
    """Every node and constant once for each place where it stands; with ``trained`` none below a ``detach``."""
    todo: list[Any] = [root]
    seen: set[Call] = set()
    while todo:
        value = todo.pop()
        yield value
        if not isinstance(value, Call) or value in seen or (trained and value.fn is torch.detach):
            continue
        seen.add(value)
        todo.extend(reversed([*value.values()]))


def evaluate(root: Node, leaf: Callable[[Leaf], Tensor]) -> Any:
    """Works an expression out.

    Args:
        root: its root.
        leaf: the value of a leaf.

    Returns:
        What the root's function returns. Whatever stands in two places is worked out once.
    """
    return _value(root, leaf, root.shared if isinstance(root, Call) else frozenset(), {})


def _value(node: Any, leaf: Callable[[Leaf], Tensor], shared: frozenset[Node], known: dict[Node, Any]) -> Any:
    # No closure that refers to itself: such a cycle would keep a chunk's tensors until the garbage collector comes.
    if not isinstance(node, Node):
        return node
    if node in known:
        return known[node]
    if isinstance(node, Call):
        args = [_value(part, leaf, shared, known) for part in node.args]
        kwargs = {name: _value(part, leaf, shared, known) for name, part in node.kwargs.items()}
        with node.autocast.restored():
            result = node.fn(*args, **kwargs)
    else:
        result = leaf(node)
    # What is needed only here goes as soon as its one reader is done with it.
    if node in shared:
        known[node] = result
    return result


@dataclass(frozen=True)
class Expression:
    """A tree and its inputs.

    Attributes:
        root: the tree.
        inputs: (\\*lead, d) each.
    """

    root: Node
    inputs: tuple[Tensor, ...]

    @property
    def lead(self) -> torch.Size:
        """The leading dimensions: one entry per token."""
        return self.inputs[0].shape[:-1]

    def reshaped(self, change: Callable[[Tensor], Tensor]) -> Expression:
        """With every input changed alike in its leading dimensions."""
        return Expression(self.root, tuple(map(change, self.inputs)))

    def detached(self) -> Expression:
        """Without any gradient."""
        if not self.parents():
            return self
        root = detached(self.root, self.inputs[0].device)
        return Expression(root, tuple(t.detach() for t in self.inputs))

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.logits()[0].source.vocab_size

    def values(self) -> Iterator[Any]:
        """Every node and every constant, maybe more than once."""
        return _walk(self.root)

    def logits(self) -> list[Logits]:
        """The heads' calls, each once."""
        return list(dict.fromkeys(node for node in self.values() if isinstance(node, Logits)))

    def constants(self) -> list[Tensor]:
        """The tensors that are the same for every token."""
        return [value for value in self.values() if isinstance(value, Tensor)]

    def parents(self) -> list[Tensor]:
        """Every tensor that gets a gradient from the expression's value."""
        found: list[Tensor] = []
        for value in _walk(self.root, trained=True):
            if isinstance(value, Leaf):
                found.append(self.inputs[value.slot])
            if isinstance(value, Logits):
                found.extend(value.source.weights)
            if isinstance(value, Tensor):
                found.append(value)
        return list(dict.fromkeys(t for t in found if t.requires_grad))

    def evaluate(self, inputs: Sequence[Tensor], heads: Mapping[Source, Head]) -> Any:
        """The value for some of the tokens.

        Args:
            inputs: (..., d) each, in the order of ``self.inputs``.
            heads: the head of each source.
        """

        def leaf(node: Leaf) -> Tensor:
            if isinstance(node, Operand):
                return inputs[node.slot]
            with node.source.autocast.restored():
                return heads[node.source](inputs[node.slot])

        return evaluate(self.root, leaf)


@dataclass
class Inputs:
    """The inputs of an expression under construction. What two of its parts share is taken once."""

    tensors: list[Tensor] = field(default_factory=list)
    sources: list[set[Source]] = field(default_factory=list)

    def join(self, expression: Expression) -> Node:
        """Takes over an expression's inputs; returns its tree, with the slots that they have here."""
        sources: list[set[Source]] = [set() for _ in expression.inputs]
        for leaf in expression.logits():
            sources[leaf.slot].add(leaf.source)
        slots = [self._slot(t, of) for t, of in zip(expression.inputs, sources, strict=True)]
        if slots == list(range(len(slots))):
            return expression.root
        return _moved(expression.root, slots, {})

    def add(self, tensor: Tensor) -> Operand:
        """Takes a tensor (\\*lead, d) with one row per token."""
        return Operand(self._slot(tensor, set()))

    def _slot(self, tensor: Tensor, sources: set[Source]) -> int:
        for slot, known in enumerate(self.tensors):
            # Views of what one head call was given, of the same elements in the same places. If one of them has no
            # graph, then it is a detached copy, all of whose readers detach their result: the other serves both.
            same = known is tensor or (sources & self.sources[slot] and _same_elements(known, tensor))
            if same:
                self.sources[slot] |= sources
                if tensor.requires_grad:
                    self.tensors[slot] = tensor
                return slot
        self.tensors.append(tensor)
        self.sources.append(sources)
        return len(self.tensors) - 1


def _moved(node: Any, slots: list[int], known: dict[Node, Node]) -> Any:
    """A tree whose inputs have other slots now; what stood in two places still is one node."""
    if not isinstance(node, Node):
        return node
    if node not in known:
        if isinstance(node, Call):
            known[node] = node.with_values(lambda part: _moved(part, slots, known))
        elif isinstance(node, Logits):
            known[node] = Logits(slots[node.slot], node.source)
        else:
            known[node] = Operand(slots[node.slot])
    return known[node]


def _same_elements(a: Tensor, b: Tensor) -> bool:
    return (
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and a.storage_offset() == b.storage_offset()
        and a.shape == b.shape
        and a.stride() == b.stride()
    )
