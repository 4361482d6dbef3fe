"""Finding what is token-wise in a decoder layer beside its MLP: norms, and attention modules but for the attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from lightning_mst.rewrite.attention import AttentionParts, rewrite_attention
from lightning_mst.rewrite.attention_interface import uses_interface
from lightning_mst.rewrite.attention_probe import probe_attention
from lightning_mst.rewrite.dataflow import ATTENTION, NormFlow, may_be_norm, norm_flow
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
        norms = {key: child for key, child in layer.named_children() if search.is_norm(child, likely)}
        flow = search.flow(layer, list(norms), likely)
        attentions = [
            search.attention(f"{name}.{key}", module, likely, is_followed=key in flow.followed)
            for key, module in _attentions(layer)
        ]
        found.attentions += attentions
        if any(candidate.rewrite is not None for candidate in attentions):
            for key, norm in norms.items():
                receivers = [layer.get_submodule(block) for block in flow.receivers.get(key, ())]
                found.norms.append(_candidate(f"{name}.{key}", norm, receivers))
    if found.norms:
        inside = {module for _, layer in layers for module in layer.modules()}
        for name, module in model.named_modules():
            if name and module not in inside and search.is_norm(module, sorted(widths)):
                found.norms.append(_candidate(name, module, []))
    return found


def _attentions(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What calls the attention interface; in a layer without such a module, what is called attention."""
    found = [(name, module) for name, module in layer.named_modules() if name and uses_interface(module)]
    children = [
        (name, m) for name, m in layer.named_children() if ATTENTION.search(name) and "norm" not in name.lower()
    ]
    yield from found or [(name, child) for name, child in children if any(True for _ in child.parameters())]


class _Search:
    """Tries modules; what it learnt of one it uses for equal ones."""

    def __init__(self, verdicts: dict[object, object]) -> None:
        self._verdicts = verdicts

    def attention(self, name: str, module: nn.Module, widths: list[int], *, is_followed: bool) -> Candidate:
        key = ("attention", signature(module))
        if key not in self._verdicts:
            self._verdicts[key] = probe_attention(module, widths)
        parts = self._verdicts[key]
        if not isinstance(parts, AttentionParts):
            return Candidate(name, type(module).__name__, None, str(parts))
        rewrite = partial(rewrite_attention, module, parts=parts, is_followed=is_followed)
        return Candidate(name, type(module).__name__, rewrite)

    def is_norm(self, module: nn.Module, widths: list[int]) -> bool:
        """Whether a module has the weights of a norm, and treats every token alike."""
        fitting = [width for width in widths if may_be_norm(module, width)]
        if isinstance(module, nn.Dropout) or not fitting:
            return False
        key = ("norm", signature(module))
        if key not in self._verdicts:
            self._verdicts[key] = probe(module, fitting).reason
        return self._verdicts[key] is None

    def flow(self, layer: nn.Module, norms: list[str], widths: list[int]) -> NormFlow:
        """Where the layer's norms stand between its blocks."""
        key = ("flow", signature(layer))
        if key not in self._verdicts:
            self._verdicts[key] = norm_flow(layer, norms, widths[0]) if norms else NormFlow()
        flow = self._verdicts[key]
        assert isinstance(flow, NormFlow)
        return flow


def _candidate(name: str, norm: nn.Module, receivers: list[nn.Module]) -> Candidate:
    return Candidate(name, type(norm).__name__, partial(rewrite_norm, norm, receivers=receivers))
