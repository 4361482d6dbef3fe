"""Finding decoder layers, MLPs and LM heads in a model, by structure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from lightning_mst.ops.chunking import BlockCost
from lightning_mst.rewrite.checkpointing import is_transformers_layer
from lightning_mst.rewrite.costs import mlp_cost
from lightning_mst.rewrite.dataflow import ATTENTION, find_pair, follower_of
from lightning_mst.rewrite.joining import rewrite_pair
from lightning_mst.rewrite.mlp import FEED_FORWARD_METHODS, rewrite_method, rewrite_mlp
from lightning_mst.rewrite.probe import Verdict, probe
from lightning_mst.rewrite.shapes import linear_shape, true_shape
from lightning_mst.rewrite.stand_in import units_inside
from lightning_mst.rewrite.structure import (
    embedding_widths,
    expert_counts,
    linear_layers,
    mirrored_widths,
    norm_widths,
)


@dataclass(frozen=True)
class Candidate:
    """A block that might be rewritten.

    Attributes:
        name: its dotted name in the model.
        class_name: what it is.
        rewrite: puts it into mini-sequence form with a number or rule of chunks; ``None`` if it must be left alone.
        reason: why it must be left alone, or what joined it.
        refused: whether leaving it alone must not go unnoticed.
    """

    name: str
    class_name: str
    rewrite: Callable[[int | str], None] | None
    reason: str = ""
    refused: bool = False


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


def find_mlps(
    model: nn.Module, layers: Iterable[tuple[str, nn.Module]], verdicts: dict[object, Verdict]
) -> list[Candidate]:
    """The MLPs of the layers, and what looked like one and has to be left alone, with the reason.

    Args:
        model: the model.
        layers: its layers, with their names.
        verdicts: remembers what was tried on the model, for the next time.
    """
    search = _Search(embedding_widths(model), verdicts)
    return [candidate for name, layer in layers for candidate in search.in_layer(name, layer)]


class _Search:
    """Looks for token-wise blocks; what it learnt of one layer it uses for equal ones."""

    def __init__(self, widths: set[int], verdicts: dict[object, Verdict]) -> None:
        self._widths = widths
        self._verdicts = verdicts
        self._costs: dict[object, BlockCost | None] = {}
        self._followers: dict[object, str | None] = {}
        self._pairs: dict[object, tuple[str, str] | None] = {}

    def in_layer(self, name: str, layer: nn.Module) -> list[Candidate]:
        found, refused = self._methods(name, layer)
        if not found:
            for key, child in layer.named_children():
                more, left = self._below(layer, key, child)
                found += [_named(name, c) for c in more]
                refused += [_named(name, c) for c in left]
        return found + refused if found else self._pair(name, layer) or refused

    def _methods(self, name: str, layer: nn.Module) -> tuple[list[Candidate], list[Candidate]]:
        for method in FEED_FORWARD_METHODS:
            if not callable(getattr(layer, method, None)) or not mirrored_widths(layer):
                continue
            verdict = self._verdict(layer, method=method)
            label = f"{type(layer).__name__}.{method}"
            if verdict.reason is not None:
                return [], [Candidate(f"{name}.{method}", label, None, verdict.reason)]
            parts = [getattr(layer, part) for part in verdict.parts]

            def rewrite(chunks: int | str, method: str = method, parts: list[nn.Module] = parts) -> None:
                rewrite_method(layer, method, chunks, parts)

            return [Candidate(f"{name}.{method}", label, rewrite)], []
        return [], []

    def _below(self, layer: nn.Module, name: str, module: nn.Module) -> tuple[list[Candidate], list[Candidate]]:
        """The outermost token-wise blocks at or below a module, and what was tried in vain."""
        if linear_shape(module) is not None or not (expert_counts(module) or mirrored_widths(module)):
            return [], []
        reason: str | None = None
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            verdict = self._verdict(module)
            if verdict.reason is None and (units := units_inside(module)) is not None:
                return [], [Candidate(name, type(module).__name__, None, units)]
            if verdict.reason is None:
                return [self._accepted(layer, name, module, verdict)], []
            reason = verdict.reason
            if verdict.counts_tokens:
                return [], [Candidate(name, type(module).__name__, None, reason, refused=True)]
        found: list[Candidate] = []
        refused: list[Candidate] = []
        for key, child in module.named_children():
            more, left = self._below(layer, f"{name}.{key}", child)
            found += more
            refused += left
        # That attention stays as it is goes without saying.
        if not found and reason is not None and not ATTENTION.search(f"{name} {type(module).__name__}"):
            refused = [Candidate(name, type(module).__name__, None, reason)]
        return found, refused

    def _accepted(self, layer: nn.Module, name: str, module: nn.Module, verdict: Verdict) -> Candidate:
        routers = [module.get_submodule(router) for router in verdict.routers]
        follower_name = self._follower(layer, name, module, verdict)
        follower = None if follower_name is None else layer.get_submodule(follower_name)

        cost = self._cost(module, verdict)

        def rewrite(chunks: int | str) -> None:
            rewrite_mlp(module, chunks, follower=follower, routers=routers, cost=cost)

        notes = ["experts"] if routers else []
        if follower_name is not None:
            notes.append(f"{follower_name} joins it")
        return Candidate(name, type(module).__name__, rewrite, ", ".join(notes))

    def _follower(self, layer: nn.Module, name: str, module: nn.Module, verdict: Verdict) -> str | None:
        key = (name, signature(layer))
        if key not in self._followers:
            found = follower_of(layer, name, verdict.outputs, verdict.width)
            if found is not None and probe(layer.get_submodule(found), [verdict.width]).reason is not None:
                found = None
            self._followers[key] = found
        return self._followers[key]

    def _pair(self, name: str, layer: nn.Module) -> list[Candidate]:
        key = signature(layer)
        if key not in self._pairs:
            self._pairs[key] = find_pair(layer, self._pair_candidates(layer))
        pair = self._pairs[key]
        if pair is None:
            return []
        first, second = (layer.get_submodule(part) for part in pair)

        def rewrite(chunks: int | str) -> None:
            rewrite_pair(first, second, chunks)

        return [Candidate(f"{name}.{pair[0]} + {pair[1]}", type(first).__name__, rewrite)]

    def _pair_candidates(self, layer: nn.Module) -> Iterator[tuple[str, str, int]]:
        names = {module: name for name, module in layer.named_modules()}
        linears = [m for m in linear_layers(layer) if not ATTENTION.search(names[m])]
        widths = norm_widths(layer) | self._widths
        for first in linears:
            for second in linears:
                shape, mirror = linear_shape(first), linear_shape(second)
                if first is not second and shape is not None and mirror == shape[::-1] and shape[0] in widths:
                    yield names[first], names[second], shape[0]

    def _verdict(self, module: nn.Module, method: str = "forward") -> Verdict:
        key = (method, signature(module))
        if key not in self._verdicts:
            likely = self._widths | norm_widths(module)
            widths = sorted({*mirrored_widths(module), *likely}, key=lambda width: width not in likely)
            self._verdicts[key] = probe(module, widths, method=method)
        return self._verdicts[key]

    def _cost(self, module: nn.Module, verdict: Verdict) -> BlockCost | None:
        key = (signature(module), tuple(p.requires_grad for p in module.parameters()))
        if key not in self._costs:
            self._costs[key] = None if verdict.routers else mlp_cost(module, verdict.width)
        return self._costs[key]

    def named(self, name: str, module: nn.Module) -> Candidate:
        """A module that the user says is an MLP."""
        verdict = self._verdict(module)
        reason = verdict.reason or units_inside(module)
        if reason is not None:
            return Candidate(name, type(module).__name__, None, reason)
        routers = [module.get_submodule(router) for router in verdict.routers]
        cost = self._cost(module, verdict)
        return Candidate(
            name, type(module).__name__, lambda chunks: rewrite_mlp(module, chunks, routers=routers, cost=cost)
        )


def _named(layer: str, candidate: Candidate) -> Candidate:
    return replace(candidate, name=f"{layer}.{candidate.name}")


def signature(module: nn.Module) -> object:
    """Something equal for modules that one trial can speak for."""
    shapes = tuple((name, true_shape(p), p.dtype, p.device) for name, p in module.named_parameters())
    switches = tuple(
        (name, key, value)
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, (bool, str))
    )
    return type(module), repr(module), shapes, switches


def match_modules(model: nn.Module, patterns: list[str], option: str) -> dict[str, nn.Module]:
    """The modules that a user's name patterns select, by name.

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
    return chosen


def match_mlps(model: nn.Module, patterns: list[str], verdicts: dict[object, Verdict]) -> list[Candidate]:
    """The MLPs that a user's name patterns select, with the reason where one can't be rewritten.

    Args:
        model: the model.
        patterns: of names of modules.
        verdicts: as for ``find_mlps``.

    Raises:
        ValueError: for a pattern that matches nothing.
    """
    search = _Search(embedding_widths(model), verdicts)
    return [search.named(name, module) for name, module in match_modules(model, patterns, "mlp_modules").items()]
