"""Finding decoder layers, MLPs and the LM head in a model, by structure."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from lightning_mst.rewrite.checkpointing import is_transformers_layer
from lightning_mst.rewrite.shadow import original_forward

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_EXPERTS = re.compile(r"moe|expert|router", re.IGNORECASE)

# Decoder layers that apply a norm to the MLP's output, and the norm's name: the modules alone don't tell.
_POST_NORMS = {
    "Gemma2DecoderLayer": "post_feedforward_layernorm",
    "Gemma3DecoderLayer": "post_feedforward_layernorm",
    "Olmo2DecoderLayer": "post_feedforward_layernorm",
    "Glm4DecoderLayer": "post_mlp_layernorm",
}


@dataclass(frozen=True)
class Candidate:
    """A module that might be rewritten.

    Attributes:
        name: its dotted name in the model.
        module: the module.
        hidden_size: D, the width of an MLP's input; 0 if nothing tells it.
        reason: why it must be left alone, or ``None``.
    """

    name: str
    module: nn.Module
    hidden_size: int = 0
    reason: str | None = None


def find_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model's repeated blocks with their names, outermost first, in order.

    These are transformers' ``GradientCheckpointingLayer`` modules, or else the elements of every ``ModuleList`` or
    ``Sequential`` of at least two modules of one class that have children themselves.
    """
    found: list[tuple[str, nn.Module]] = []
    inside: set[nn.Module] = set()
    transformers_model = any(is_transformers_layer(m) for m in model.modules())
    for name, module in model.named_modules():
        if module in inside:
            continue
        if transformers_model:
            layers = [(name, module)] if is_transformers_layer(module) else []
        else:
            layers = [(f"{name}.{key}" if name else key, layer) for key, layer in _repeated(module)]
        for layer_name, layer in layers:
            found.append((layer_name, layer))
            inside.update(layer.modules())
    return found


def _repeated(module: nn.Module) -> list[tuple[str, nn.Module]]:
    children = list(module.named_children())
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(children) < 2:
        return []
    one_class = len({type(child) for _, child in children}) == 1
    return children if one_class and all(any(True for _ in child.children()) for _, child in children) else []


def find_mlps(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> list[Candidate]:
    """The MLPs of the decoder layers, and what looked like one and has to be left alone, with the reason."""
    widths = hidden_sizes(model)
    return [candidate for name, layer in layers for candidate in _mlps_of_layer(name, layer, widths)]


def _mlps_of_layer(layer_name: str, layer: nn.Module, widths: set[int]) -> Iterator[Candidate]:
    done: set[nn.Module] = set()
    for name, module in layer.named_modules(prefix=layer_name):
        if module is layer or module in done:
            continue
        if _says(_EXPERTS, name, module) or any(_says(_EXPERTS, n, m) for n, m in module.named_children()):
            done.update(module.modules())
            yield Candidate(name, module, reason="mixture of experts: not supported in mini-sequence form yet")
            continue
        if _says(_ATTENTION, name, module):
            done.update(module.modules())
            continue
        hidden_size = mlp_hidden_size(module, widths)
        if hidden_size is None:
            continue
        done.update(module.modules())
        reason = None if _takes_one_tensor(module) else "its forward needs more than one argument"
        yield Candidate(name, module, hidden_size, reason)


def _says(pattern: re.Pattern[str], name: str, module: nn.Module) -> bool:
    return bool(pattern.search(name.rpartition(".")[2]) or pattern.search(type(module).__name__))


def mlp_hidden_size(module: nn.Module, widths: set[int]) -> int | None:
    """D, if the module's own linear layers are one down projection I -> D and up projections D -> I or D -> 2 I.

    Args:
        module: the candidate.
        widths: the model's hidden sizes, as far as they are known. Up and down are mirror images of each other in an
            MLP of two layers; this tells them apart.
    """
    shapes = [s for s in map(_linear_shape, module.children()) if s is not None]
    if len(shapes) < 2:
        return None
    # The down projection is usually the last to be registered.
    for position, (inner, hidden_size) in reversed(list(enumerate(shapes))):
        ups = shapes[:position] + shapes[position + 1 :]
        fits = all(up[0] == hidden_size and up[1] in (inner, 2 * inner) for up in ups)
        if fits and (not widths or hidden_size in widths):
            return hidden_size
    return None


def hidden_sizes(model: nn.Module) -> set[int]:
    """The widths of the model's embedding tables."""
    return {m.embedding_dim for m in model.modules() if isinstance(m, nn.Embedding)}


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer; GPT-2's ``Conv1D`` is one whose weight is stored transposed."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx"):
        return module.nx, module.nf
    return None


def _takes_one_tensor(module: nn.Module) -> bool:
    parameters = inspect.signature(original_forward(module)).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return len(required) == 1


def post_norm_of(layer: nn.Module, mlp: nn.Module) -> nn.Module | None:
    """The norm that a decoder layer applies to its MLP's output, if it is known to."""
    for cls in type(layer).__mro__:
        name = _POST_NORMS.get(cls.__name__)
        if name is not None and mlp in set(layer.children()):
            return getattr(layer, name)
    return None


def match_modules(model: nn.Module, patterns: list[str], option: str) -> list[Candidate]:
    """The modules that a user's name patterns select.

    Raises:
        ValueError: for a pattern that matches nothing.
    """
    names = {name: module for name, module in model.named_modules() if name}
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        matches = {name: module for name, module in names.items() if fnmatchcase(name, pattern)}
        if not matches:
            leaves = sorted({re.sub(r"\d+", "*", name) for name in names})
            raise ValueError(
                f"{option}: the pattern {pattern!r} matches no module of {type(model).__name__}. Its modules are "
                f"{', '.join(leaves[:40])}{', ...' if len(leaves) > 40 else ''}."
            )
        chosen.update(matches)
    widths = hidden_sizes(model)
    default = min(widths, default=0)
    return [Candidate(name, module, mlp_hidden_size(module, widths) or default) for name, module in chosen.items()]


def find_lm_head(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> Candidate | str:
    """The module that maps hidden states to logits, or in words why there is none to rewrite.

    It is what a transformers model names as its output embeddings, or else the one linear layer outside the decoder
    layers whose output is as wide as an embedding table is long.
    """
    names = {module: name for name, module in model.named_modules()}
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        if isinstance(head, nn.Module) and head in names:
            return Candidate(names[head], head, reason=why_not_a_head(head))
    inside = {m for _, layer in layers for m in layer.modules()}
    tables = {(m.embedding_dim, m.num_embeddings) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = [
        module
        for module in names
        if isinstance(module, nn.Linear)
        and module not in inside
        and (module.in_features, module.out_features) in tables
    ]
    if not heads:
        return "no linear layer outside the decoder layers is as wide as an embedding table is long"
    if len(heads) > 1:
        return f"several candidates ({', '.join(names[h] for h in heads)}): name one in lm_head_module"
    return Candidate(names[heads[0]], heads[0], reason=why_not_a_head(heads[0]))


def why_not_a_head(module: nn.Module) -> str | None:
    """Why a module can't be a mini-sequence LM head: it must be a linear layer with the usual forward."""
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return None
    return f"{type(module).__name__} is not a plain linear layer"
