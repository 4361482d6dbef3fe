"""Finding what is token-wise in a decoder layer beside its MLP: norms, and attention modules but for the attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from lightning_mst.rewrite.attention import rewrite_attention
from lightning_mst.rewrite.attention_interface import uses_interface
from lightning_mst.rewrite.attention_probe import AttentionVerdict, probe_attention
from lightning_mst.rewrite.dataflow import ATTENTION, may_be_norm
from lightning_mst.rewrite.discovery import Candidate, signature
from lightning_mst.rewrite.norms import rewrite_norm
from lightning_mst.rewrite.probe import probe
from lightning_mst.rewrite.structure import embedding_widths, norm_widths


@dataclass
class LayerParts:
    """What ``layer_chunks`` rewrites.

    Attributes:
        attentions: a candidate for each attention module of a layer, with the reason where it must be left as it is.
        norms: of the layers whose attention can be rewritten, and those outside of the layers.
    """

    attentions: list[Candidate] = field(default_factory=list)
    norms: list[Candidate] = field(default_factory=list)


def find_layer_parts(
    model: nn.Module, layers: Sequence[tuple[str, nn.Module]], verdicts: dict[object, object]
) -> LayerParts:
    """The attention modules and norms of a model.

    Args:
        model: the model.
        layers: its layers, with their names.
        verdicts: remembers what was tried on the model, for the next time.
    """
    widths = embedding_widths(model)
    search = _Search(verdicts)
    found = LayerParts()
    for name, layer in layers:
        likely = sorted(norm_widths(layer) | widths, key=lambda width: width not in widths)
        attentions = [search.attention(f"{name}.{key}", module, likely) for key, module in _attentions(layer)]
        found.attentions += attentions
        if any(candidate.rewrite is not None for candidate in attentions):
            for key, child in layer.named_children():
                found.norms += search.norm(f"{name}.{key}", child, likely, hands_on=True)
    if found.norms:
        inside = {module for _, layer in layers for module in layer.modules()}
        for name, module in model.named_modules():
            if name and module not in inside:
                found.norms += search.norm(name, module, sorted(widths), hands_on=False)
    return found


def _attentions(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What calls the attention interface; in a layer without such a module, what is called attention."""
    found = [(name, module) for name, module in layer.named_modules() if name and uses_interface(module)]
    children = [(name, child) for name, child in layer.named_children() if ATTENTION.search(name)]
    yield from found or [(name, child) for name, child in children if any(True for _ in child.parameters())]


class _Search:
    """Tries modules; what it learnt of one it uses for equal ones."""

    def __init__(self, verdicts: dict[object, object]) -> None:
        self._verdicts = verdicts

    def attention(self, name: str, module: nn.Module, widths: list[int]) -> Candidate:
        key = ("attention", signature(module))
        if key not in self._verdicts:
            self._verdicts[key] = probe_attention(module, widths)
        verdict = self._verdicts[key]
        assert isinstance(verdict, AttentionVerdict)
        if verdict.reason is not None:
            return Candidate(name, type(module).__name__, None, verdict.reason)
        rewrite = partial(
            rewrite_attention,
            module,
            after=verdict.after,
            returns_weights=verdict.returns_weights,
            reads=verdict.reads,
        )
        return Candidate(name, type(module).__name__, rewrite)

    def norm(self, name: str, module: nn.Module, widths: list[int], *, hands_on: bool) -> list[Candidate]:
        """A candidate, or nothing where the module is no norm."""
        if isinstance(module, nn.Dropout) or not any(may_be_norm(module, width) for width in widths):
            return []
        key = ("norm", signature(module))
        if key not in self._verdicts:
            self._verdicts[key] = probe(module, [width for width in widths if may_be_norm(module, width)]).reason
        if self._verdicts[key] is not None:
            return []
        return [Candidate(name, type(module).__name__, partial(rewrite_norm, module, hands_on=hands_on))]
