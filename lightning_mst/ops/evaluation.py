"""Working expressions out: at once, chunk by chunk, or as a cross-entropy.

Each way asks the heads for their weights first. A head is asked by calling it again with a request, so that whoever
gathers its weights in a forward hook (FSDP, ZeRO) gathers them once for all chunks; several heads are asked one inside
the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_mst.ops.chosen_logits import chosen_logits
from lightning_mst.ops.chunking import chunk_bounds, resolve_num_chunks
from lightning_mst.ops.context import AutocastState, drop_autocast_copies
from lightning_mst.ops.expression import Call, Expression, Inputs, Logits, Operand, Source, evaluate
from lightning_mst.ops.heads import Head, LinearHead
from lightning_mst.ops.linear_cross_entropy import head_cross_entropy
from lightning_mst.ops.token_wise import token_wise

_Compute = Callable[[list[Tensor], Mapping[Source, Head]], tuple[Tensor, ...]]


def at_once(expression: Expression) -> Tensor:
    """The whole value, (\\*lead, V)."""
    (result,) = _ask(expression, lambda inputs, heads: (expression.evaluate(inputs, heads),))
    return result


def in_chunks(expression: Expression) -> tuple[Tensor, ...]:
    """The value of an expression that ends in a small result per token, without ever holding more than a chunk.

    Backward evaluates each chunk again: 4 matmuls, and nothing as wide as the vocabulary is kept.

    Returns:
        (\\*lead, ...), one for each tensor that the root's function returns.
    """
    return _ask(expression, lambda inputs, heads: _in_chunks(expression, inputs, heads))


def _in_chunks(expression: Expression, inputs: list[Tensor], heads: Mapping[Source, Head]) -> tuple[Tensor, ...]:
    lead = inputs[0].shape[:-1]
    result = token_wise(
        lambda *rows: expression.evaluate(rows, heads),
        list(map(_rows, inputs)),
        parameters=[*(p for head in heads.values() for p in head.parameters), *expression.constants()],
        keep_single_chunk=False,
        **expression.logits()[0].source.split,
    )
    results = (result,) if isinstance(result, Tensor) else result
    return tuple(t.view((*lead, *t.shape[1:])) for t in results)


def gather(expression: Expression, index: Tensor) -> Tensor:
    """The entries at given places of the vocabulary.

    Where a gradient is wanted of pointwise work on the logits of one linear head, only these logits are computed.
    Otherwise they come from the same matmul as all others, so that comparing the two finds equal what is equal: a
    label's rank is asked for without gradients.

    Args:
        expression: (\\*lead, V).
        index: (\\*lead, k), int64.

    Returns:
        (\\*lead, k).
    """
    inputs = Inputs()
    root, places = inputs.join(expression), inputs.add(index)
    gathered = Call(torch.gather, (root, -1, places), {}, AutocastState.now(index.device))
    whole = Expression(gathered, tuple(inputs.tensors))
    leaf = _only_logits(expression) if torch.is_grad_enabled() and expression.parents() else None

    def compute(inputs: list[Tensor], heads: Mapping[Source, Head]) -> tuple[Tensor, ...]:
        head = None if leaf is None else heads[leaf.source]
        hidden_size = inputs[0 if leaf is None else leaf.slot].shape[-1]
        few = index.shape[-1] * hidden_size <= expression.vocab_size
        if leaf is None or not few or not isinstance(head, LinearHead) or not head.is_plain:
            return _in_chunks(whole, inputs, heads)
        rows = list(map(_rows, inputs))
        tokens = rows[0].shape[0]
        split = {"num_chunks": None, "chunk_tokens": None, **leaf.source.split}
        bounds = chunk_bounds(tokens, resolve_num_chunks(tokens, **split))
        with leaf.source.autocast.restored():
            entries = chosen_logits(rows[leaf.slot], head.weight, head.bias, rows[places.slot], bounds)
        result = evaluate(root, lambda node: entries if node == leaf else rows[node.slot])
        return (result.view(index.shape),)

    (result,) = _ask(whole, compute)
    return result


def _only_logits(expression: Expression) -> Logits | None:
    """The one head call, if every entry of the expression depends on the same entry of its logits alone."""
    values = list(expression.values())
    leaves = expression.logits()
    calls = all(value.is_pointwise for value in values if isinstance(value, Call))
    constants = all(value.numel() == 1 for value in values if isinstance(value, Tensor))
    operands = all(expression.inputs[value.slot].shape[-1] == 1 for value in values if isinstance(value, Operand))
    return leaves[0] if len(leaves) == 1 and calls and constants and operands else None


def cross_entropy(expression: Expression, labels: Tensor, **options: Any) -> Tensor | None:
    """Op 2 on logits (\\*lead, V).

    Args:
        expression: the logits.
        labels: (\\*lead).
        options: of ``head_cross_entropy``.

    Returns:
        The loss, or ``None`` if the logits are more than a function of the logits of one head call.
    """
    leaves = expression.logits()
    if len(leaves) > 1 or len(expression.inputs) > 1 or any(t.requires_grad for t in expression.constants()):
        return None
    (leaf,) = leaves

    def logits_fn(logits: Tensor) -> Tensor:
        return evaluate(expression.root, lambda _: logits)

    def compute(inputs: list[Tensor], heads: Mapping[Source, Head]) -> tuple[Tensor, ...]:
        fn = None if expression.root == leaf else logits_fn
        how: dict[str, Any] = {**leaf.source.split, **options}
        return (head_cross_entropy(inputs[0], heads[leaf.source], labels, logits_fn=fn, **how),)

    (result,) = _ask(expression, compute)
    return result


def _rows(tensor: Tensor) -> Tensor:
    """(*lead, d) -> (tokens, d)."""
    return tensor.reshape(-1, tensor.shape[-1])


def _ask(expression: Expression, compute: _Compute) -> tuple[Tensor, ...]:
    """Runs ``compute`` with the heads at hand, and without a graph where nothing gets a gradient."""
    inputs = list(expression.inputs)
    heads: dict[Source, Head] = {}
    calls: dict[Any, list[Logits]] = {}
    for leaf in expression.logits():
        calls.setdefault(leaf.source.run, []).append(leaf)
    with torch.set_grad_enabled(torch.is_grad_enabled() and bool(expression.parents())):
        answer = _ask_each(list(calls.values()), inputs, heads, compute)
    if any(source.autocast.enabled for source in heads):
        drop_autocast_copies()
    hooks = [hook for source in heads for hook in source.hooks]
    for result in answer:
        for hook in hooks if result.requires_grad else ():
            result.register_hook(hook)
    return answer


def _ask_each(
    calls: list[list[Logits]], inputs: list[Tensor], heads: dict[Source, Head], compute: _Compute
) -> tuple[Tensor, ...]:
    """Asks the first head for its weights, and inside that the others; each of ``calls`` is of one head."""
    if not calls:
        # FSDP takes a view for a tensor that a later in-place operation may cut off from its hooks.
        return tuple(t.clone() if t.requires_grad and t._is_view() else t for t in compute(inputs, heads))
    leaves, *others = calls
    slot, source = leaves[0].slot, leaves[0].source
    given: list[int] = []

    def request(hidden: Tensor, head: Head) -> tuple[Tensor, ...]:
        inputs[slot] = hidden
        heads.update((leaf.source, head) for leaf in leaves)
        results = _ask_each(others, inputs, heads, compute)
        given.append(len(results))
        return results

    with source.autocast.restored():
        answer = source.run(request, inputs[slot])
    if not isinstance(answer, tuple) or len(answer) not in given:
        raise RuntimeError(
            "A forward hook of the LM head changed the answer to a request for its logits: expected a tuple of "
            f"{given[-1] if given else 1} tensors, got {type(answer).__name__}. In mini-sequence form the head is "
            "called again for its loss; let the hook leave tuples alone, or set lm_head_chunks=None."
        )
    return answer
