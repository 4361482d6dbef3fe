"""Finding LM heads: what maps hidden states to the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from lightning_mst.rewrite.discovery import Candidate, match_modules
from lightning_mst.rewrite.lm_head import rewrite_lm_head
from lightning_mst.rewrite.probe import probe
from lightning_mst.rewrite.shapes import linear_shape
from lightning_mst.rewrite.structure import embedding_widths, linear_layers, norm_widths


def find_lm_heads(model: nn.Module, layers: Sequence[tuple[str, nn.Module]]) -> list[Candidate]:
    """The modules that map hidden states to logits, and other heads, which are left alone, with the reason.

    An LM head is what a transformers model names as its output embeddings, or else a linear layer outside the layers
    whose output is as wide as an embedding table is long: several of them for multi-token prediction.
    """
    names = {module: name for name, module in model.named_modules()}
    named = _output_embeddings(model, names)
    if named:
        return [_candidate(names[head], head, model) for head in named]
    inside = {m for _, layer in layers for m in layer.modules()}
    outside = [m for m in linear_layers(model) if m not in inside]
    tables = {(m.embedding_dim, m.num_embeddings) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = [m for m in outside if linear_shape(m) in tables]
    if heads:
        return [_candidate(names[head], head, model) for head in heads]
    reason = "no linear layer outside the layers is as wide as an embedding table is long"
    widths = embedding_widths(model).union(*(norm_widths(layer) for _, layer in layers))
    others = [m for m in outside if _width(m) in widths and _outputs(m) != _width(m)]
    return [
        Candidate(names[m], type(m).__name__, None, f"a head of {_outputs(m)} outputs is no LM head") for m in others
    ] or [Candidate("", "", None, reason)]


def match_lm_heads(model: nn.Module, pattern: str) -> list[Candidate]:
    """The heads that a user's name pattern selects, with the reason where one can't be rewritten.

    Raises:
        ValueError: for a pattern that matches nothing.
    """
    return [_candidate(name, head, model) for name, head in match_modules(model, [pattern], "lm_head_module").items()]


def _output_embeddings(model: nn.Module, names: dict[nn.Module, str]) -> list[nn.Module]:
    found: dict[nn.Module, None] = {}
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        if isinstance(head, nn.Module) and head in names:
            found[head] = None
    return list(found)


def _candidate(name: str, head: nn.Module, model: nn.Module) -> Candidate:
    class_name = type(head).__name__
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    if not plain:
        shape = linear_shape(head)
        if shape is None and not any(True for _ in linear_layers(head)):
            return Candidate(name, class_name, None, "holds no linear layer")
        widths = [shape[0]] if shape else sorted(embedding_widths(model) | norm_widths(model))
        reason = probe(head, widths, keeps_width=False).reason
        if reason is not None:
            return Candidate(name, class_name, None, reason)
    return Candidate(name, class_name, partial(rewrite_lm_head, head))


def _width(module: nn.Module) -> int:
    shape = linear_shape(module)
    return shape[0] if shape else 0


def _outputs(module: nn.Module) -> int:
    shape = linear_shape(module)
    return shape[1] if shape else 0
