"""The token-wise parts of an attention module in mini-sequence form: all but the attention itself.

What a module computes up to its attention (the norm before it, projections, norms of queries and keys, the rotary
embedding) runs over mini-sequences into whole queries, keys and values; then the attention runs on these, as ever; then
what follows it, the output projection above all, over mini-sequences again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_mst.ops.linear_reads import LinearReads
from lightning_mst.rewrite.attention_interface import Projected, attention_of, is_by_heads, stop, with_attention
from lightning_mst.rewrite.call import Call
from lightning_mst.rewrite.handed_on import real
from lightning_mst.rewrite.hooks import is_hooked, is_hooked_inside
from lightning_mst.rewrite.joining import defer
from lightning_mst.rewrite.pace import Pace
from lightning_mst.rewrite.shadow import form_of, original_forward, shadow_method

_MASK = "attention_mask"
# Keys and values from elsewhere: of earlier tokens, or of an encoder.
_ELSEWHERE = ("past_key_values", "past_key_value", "layer_past", "key_value_states", "encoder_hidden_states")


@dataclass(frozen=True)
class AttentionParts:
    """What an attention module does before and after its attention, as ``attention_probe`` finds it.

    Attributes:
        after: names of the children that run after the attention, in order, each on the output of the one before.
        returns_weights: whether the module returns (output, attention weights) or the output alone.
        reads: which results of the linear layers before the attention are read in the backward pass.
        reads_after: the same of those after it.
    """

    after: tuple[str, ...]
    returns_weights: bool
    reads: LinearReads
    reads_after: LinearReads


@dataclass
class AttentionForm:
    """The settings of an attention module in mini-sequence form."""

    chunks: int | str
    parts: AttentionParts
    # Whether the layer gives the module's output to a norm in mini-sequence form, which then joins it.
    is_followed: bool
    pace: Pace = field(default_factory=Pace)


def rewrite_attention(
    module: nn.Module, chunks: int | str, parts: AttentionParts, *, is_followed: bool = False
) -> None:
    """Lets all of an attention module but the attention itself run over mini-sequences.

    Args:
        module: the module.
        chunks: M, ``"auto"`` or ``"paper"``.
        parts: what it does before and after its attention.
        is_followed: whether the layer gives the module's output to a norm in mini-sequence form, which then joins it.
    """
    shadow_method(module, _attention_forward, AttentionForm(chunks, parts, is_followed))


def _attention_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    form: AttentionForm = form_of(self)
    arguments = Arguments(self, args, kwargs)
    if arguments.looks_elsewhere:
        return arguments.run()
    call = Call(type(self).__name__, tuple(arguments.tokens), {})
    num_chunks = call.num_chunks(form.chunks, form.pace)
    if num_chunks == 1:
        return arguments.run()
    arguments.check()
    name = type(self).__name__
    last = [self.get_submodule(child) for child in form.parts.after]
    # The trial ran without hooks. One that uses the output of a projection reads what is not read otherwise.
    known = not is_hooked_inside(self)
    options: dict[str, Any] = {}
    num_tokens = call.x.shape[:2].numel()

    def first(*tokens: Tensor) -> tuple[Tensor, ...]:
        heads = project(self, arguments, tokens, options)
        groups = 1
        if is_by_heads(self, arguments.mask, options):
            groups = head_groups(heads[0].shape[2], heads[1].shape[2], num_tokens)
        return tuple(part for t in heads for part in t.split(t.shape[2] // groups, 2))

    def after(*parts: Tensor) -> Tensor:
        return in_turn(last, parts[0] if len(parts) == 1 else torch.cat(parts, -1))

    projected = call.run(
        forward=first,
        num_chunks=num_chunks,
        parts=list(_without(self, last)),
        reads=form.parts.reads if known else None,
        movable=True,
    )
    arguments.forget()
    outputs, weights = _attend(self, projected, arguments.mask, options)
    del projected
    how: dict[str, Any] = {
        "forward": after,
        "num_chunks": num_chunks,
        "parts": last,
        "reads": form.parts.reads_after if known else None,
        "movable": True,
    }
    end = Call(name, tuple(outputs), {})
    # Whoever hooks the module, to gather its weights or to see its output, expects its work to be done inside.
    result = defer(end, call.x.shape[-1], **how) if form.is_followed and not is_hooked(self) else end.run(**how)
    return (result, weights) if form.parts.returns_weights else result


def _attend(
    module: nn.Module, projected: tuple[Tensor, ...], mask: Any, options: Mapping[str, Any]
) -> tuple[list[Tensor], Any]:
    """Runs the attention, one group of heads after the other.

    Args:
        module: the module.
        projected: the groups' queries, then their keys, then their values, (B, S, H, d) each.
        mask: for the attention.
        options: for the attention.

    Returns:
        The groups' outputs (B, S, H * d), and the attention weights where there is one group.
    """
    attention = attention_of(module)
    groups = len(projected) // 3
    outputs: list[Tensor] = []
    weights = None
    for heads in zip(projected[:groups], projected[groups : 2 * groups], projected[2 * groups :], strict=True):
        output, weights = attention(module, *(t.transpose(1, 2) for t in heads), mask, **options)
        outputs.append(output.reshape(*output.shape[:2], -1))
    return outputs, weights if groups == 1 else None


_MOST_GROUPS = 8
_LEAST_QUERIES = 2**16


def head_groups(num_heads: int, num_kv_heads: int, num_tokens: int) -> int:
    """Into how many groups of heads attention is split.

    A flash kernel's backward pass takes fp32 sums of the queries' gradients, and with grouped queries a key and a value
    gradient for every query head: 2 to 4 times the hidden states. By groups it takes these of one group at a time, and
    what a group kept is gone when the next one comes. A group keeps so many queries that a device stays busy: 65,536
    are 512 blocks of the kernel.

    Args:
        num_heads: H, of the queries.
        num_kv_heads: H_kv, of keys and values.
        num_tokens: B * S.

    Returns:
        A divisor of H_kv, at most 8.
    """
    most = min(_MOST_GROUPS, num_heads * num_tokens // _LEAST_QUERIES)
    return max((n for n in range(1, most + 1) if num_kv_heads % n == 0 and num_heads % n == 0), default=1)


def project(
    module: nn.Module, arguments: Arguments, tokens: tuple[Tensor, ...], options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Runs an attention module on a mini-sequence, as far as its attention.

    Args:
        module: the module.
        arguments: the call.
        tokens: for each of ``arguments.tokens``, some of the tokens, (1, tokens, ...).
        options: is given what the module says to its attention, of all tokens, unless it is known already.

    Returns:
        Query, key and value, (1, tokens, H, d) each.
    """
    try:
        with with_attention(module, stop):
            arguments.run(tokens)
    except Projected as projected:
        if not options:
            options.update(arguments.whole(projected.options, tokens))
        return tuple(t.transpose(1, 2) for t in projected.heads)
    raise RuntimeError(
        f"{type(module).__name__} did not come to its attention. Set layer_chunks=None, and please report the model."
    )


def in_turn(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Applies modules, each to the output of the one before."""
    for module in modules:
        x = module(x)
    return x


def _without(module: nn.Module, parts: list[nn.Module]) -> Iterator[nn.Module]:
    """The outermost modules that hold the weights of ``module`` but those of ``parts``."""
    if not any(part in parts for part in module.modules()):
        yield module
        return
    for child in module.children():
        if child not in parts:
            yield from _without(child, parts)


class Arguments:
    """One call of an attention module: which of its arguments have an entry for each token.

    Args:
        module: the module.
        args: as it was called.
        kwargs: as it was called.

    Attributes:
        mask: the attention mask, which only the attention itself gets.
        looks_elsewhere: whether keys and values come from other tokens than queries, as in generation.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._module = module
        self._forward = original_forward(module)
        self._name = type(module).__name__
        self._given = (args, kwargs)
        bound = inspect.signature(self._forward).bind(*args, **kwargs)
        self.looks_elsewhere = any(_named(bound, name) is not None for name in _ELSEWHERE)
        self.mask = _named(bound, _MASK)
        for named in (bound.arguments, _others_of(bound)):
            if _MASK in named:
                named[_MASK] = None
        leaves, self._structure = tree_flatten((bound.args, bound.kwargs))
        first = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        self._lead: Size = leaves[first].shape[:2]
        self._slots = [i for i, leaf in enumerate(leaves) if i == first or self._is_of_tokens(leaf)]
        self._whole = [leaves[i] for i in self._slots]
        # Without the tokens' tensors: what the chunks' function refers to lives until backward.
        self._others = [None if i in self._slots else leaf for i, leaf in enumerate(leaves)]

    @property
    def tokens(self) -> list[Tensor]:
        """The hidden states (B, S, D), and the other tensors that have an entry for each token, (B, S, ...)."""
        first, *others = self._whole
        return [first, *(t.expand(*self._lead, *t.shape[2:]) for t in others)]

    def run(self, tokens: tuple[Tensor, ...] | None = None) -> Any:
        """Calls the module as it was called, or on a mini-sequence without a mask."""
        if tokens is None:
            args, kwargs = real(self._given)
        else:
            leaves = list(self._others)
            for slot, tensor in zip(self._slots, tokens, strict=True):
                leaves[slot] = tensor
            args, kwargs = tree_unflatten(leaves, self._structure)
        return self._forward(*args, **kwargs)

    def forget(self) -> None:
        """Lets go of the whole tensors: the chunks' function refers to this call until the backward pass."""
        self._given, self._whole = ((), {}), []

    def whole(self, options: Mapping[str, Any], tokens: tuple[Tensor, ...]) -> dict[str, Any]:
        """What the module says to its attention, of all tokens.

        Args:
            options: what it said of a mini-sequence.
            tokens: the mini-sequence.
        """
        whole_of = {id(piece): whole for piece, whole in zip(tokens, self._whole, strict=True)}
        passed_on = {id(leaf) for leaf in self._others} | {id(t) for t in self._module.parameters()}
        passed_on |= {id(t) for t in self._module.buffers()}
        for name, value in options.items():
            if isinstance(value, Tensor) and id(value) not in whole_of and id(value) not in passed_on:
                raise RuntimeError(
                    f"{self._name} computes {name} for its attention by itself, which mini-sequences can't give it. "
                    "Set layer_chunks=None."
                )
        return {name: whole_of.get(id(value), value) for name, value in options.items()}

    def check(self) -> None:
        """Raises if a tensor seems to have an entry for each token, but not where it is looked for."""
        length = self._lead[1]
        for leaf in self._others:
            if isinstance(leaf, Tensor) and leaf.dim() > 1 and length in leaf.shape:
                raise TypeError(
                    f"{self._name} runs in mini-sequences with hidden states {tuple(self._lead)} + (D,) and other "
                    f"tensors of the same first two dimensions, but was called with one of shape {tuple(leaf.shape)}. "
                    "Set layer_chunks=None."
                )

    def _is_of_tokens(self, leaf: Any) -> bool:
        if not isinstance(leaf, Tensor) or leaf.dim() < 2:
            return False
        batch, length = self._lead
        return leaf.shape[0] in (1, batch) and leaf.shape[1] == length


def _named(bound: inspect.BoundArguments, name: str) -> Any:
    """An argument by its name, whether the function names it or not."""
    if name in bound.arguments:
        return bound.arguments[name]
    return _others_of(bound).get(name)


def _others_of(bound: inspect.BoundArguments) -> dict[str, Any]:
    parameters = bound.signature.parameters.values()
    names = [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
    found: dict[str, Any] = bound.arguments.get(names[0], {}) if names else {}
    return found
