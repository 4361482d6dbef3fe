"""Two and three equal layers speak for any number of them: memory is linear in it, place by place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from lightning_mst.memory.attention import configs_of
from lightning_mst.memory.places import Place
from lightning_mst.memory.tensor_bytes import Peak
from lightning_mst.rewrite.checkpointing import is_checkpointed
from lightning_mst.rewrite.discovery import find_layers


class Role(NamedTuple):
    """A place in a model of any depth.

    Attributes:
        phase: as of a ``Place``.
        layer: the index of a layer in the whole model, or ``None``.
        block: the block's name, within the layer where there is one.
    """

    phase: str
    layer: int | None
    block: str


@dataclass(frozen=True)
class Depth:
    """How a model's layers fall into groups of equal ones.

    Attributes:
        names: the layers' names, in order.
        groups: the indices of the layers in each group.
    """

    names: list[str]
    groups: list[list[int]]


def depth_of(model: nn.Module) -> Depth:
    """Groups the layers by class, place, parameters, settings (such as a kind of attention), and checkpointing."""
    layers = find_layers(model)
    groups: dict[object, list[int]] = {}
    for index, (name, layer) in enumerate(layers):
        parameters = tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in layer.named_parameters())
        settings = tuple(
            (part_name, key, value)
            for part_name, part in layer.named_modules()
            for key, value in vars(part).items()
            if isinstance(value, (bool, str))
        )
        key = (name.rpartition(".")[0], type(layer), parameters, settings, is_checkpointed(layer))
        groups.setdefault(key, []).append(index)
    return Depth([name for name, _ in layers], list(groups.values()))


def peaks_of(model: nn.Module, run: Callable[[], Mapping[Place, Peak]], *, shallow: int = 2) -> dict[Role, Peak]:
    """The peaks of a step of the whole model, from steps of shorter ones.

    The layers at both ends of a group bound what is between them, as memory is linear in the position, too.

    Args:
        model: with all its layers.
        run: a step of the model as it is then.
        shallow: how many layers of a group the smallest model has, half of them from each end. More than two, where
            the layers next to the ends differ from those further in.

    Returns:
        The peak at each place.
    """
    depth = depth_of(model)
    ends = [_ends(group, shallow) for group in depth.groups]
    base = _run_with(model, depth, ends, ends, run)
    slopes = []
    for index, group in enumerate(depth.groups):
        if len(group) > len(ends[index]):
            one_more = [_ends(group, shallow + 1) if i == index else others for i, others in enumerate(ends)]
            slopes.append((len(group) - len(ends[index]), _run_with(model, depth, one_more, ends, run)))
    common = set(base).intersection(*(deeper for _, deeper in slopes))
    return {role: _extended(base[role], [(n, deeper[role]) for n, deeper in slopes]) for role in common}


def _ends(group: list[int], count: int) -> list[int]:
    """So many of a group's layers: half of them from each end, of an odd number one more from the front."""
    return group if len(group) <= count else [*group[: count - count // 2], *group[len(group) - count // 2 :]]


def _run_with(
    model: nn.Module,
    depth: Depth,
    groups: list[list[int]],
    ends: list[list[int]],
    run: Callable[[], Mapping[Place, Peak]],
) -> dict[Role, Peak]:
    """The peaks of a model with these layers of each group, at the layers at the ends and outside of the layers."""
    kept = sorted(index for group in groups for index in group)
    told = {index for group in ends for index in group}
    with _only(model, [depth.names[index] for index in kept]) as new_names:
        peaks = run()
    indices = dict(zip(new_names, kept, strict=True))
    found: dict[Role, Peak] = {}
    for place, peak in peaks.items():
        index = indices.get(place.layer)
        if index is None or index in told:
            found[Role(place.phase, index, place.block)] = peak
    return found


@contextmanager
def _only(model: nn.Module, names: list[str]) -> Iterator[list[str]]:
    """Leaves only these layers in a model while the body runs, and yields their names in it.

    Their kinds, which transformers' configurations list by position, move with them.
    """
    before: dict[str, dict[str, nn.Module | None]] = {}
    new_names: dict[str, str] = {}
    all_names = [name for name, _ in find_layers(model)]
    kinds = [(config, config.layer_types) for config in configs_of(model) if _lists_layers(config, len(all_names))]
    for path in {name.rpartition(".")[0] for name in all_names}:
        container = model.get_submodule(path)
        before[path] = dict(container._modules)
        container._modules.clear()
        for name in names:
            parent, _, key = name.rpartition(".")
            if parent == path:
                # A ModuleList counts; the parts of other containers go by their names.
                new_key = str(len(container._modules)) if isinstance(container, nn.ModuleList) else key
                container._modules[new_key] = before[path][key]
                new_names[name] = f"{path}.{new_key}" if path else new_key
    try:
        for config, of_all in kinds:
            config.layer_types = [of_all[all_names.index(name)] for name in names]
        yield [new_names[name] for name in names]
    finally:
        for config, of_all in kinds:
            config.layer_types = of_all
        for path, modules in before.items():
            container = model.get_submodule(path)
            container._modules.clear()
            container._modules.update(modules)


def _lists_layers(config: Any, count: int) -> bool:
    kinds = getattr(config, "layer_types", None)
    return isinstance(kinds, list) and len(kinds) == count


def _extended(base: Peak, slopes: list[tuple[int, Peak]]) -> Peak:
    def at(value: Callable[[Peak], int]) -> int:
        return value(base) + sum(n * (value(deeper) - value(base)) for n, deeper in slopes)

    kinds = {kind for peak in (base, *(deeper for _, deeper in slopes)) for kind in peak.kinds}
    return Peak(
        at(lambda p: p.total),
        {kind: at(lambda p, kind=kind: p.kinds.get(kind, 0)) for kind in kinds},  # type: ignore[misc]
        at(lambda p: p.inside),
    )
