"""Memory over the course of one training step, as data: which block was at work, and how many bytes were alive."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from torch import nn

from lightning_mst.memory.places import Place, Where, blocks_of
from lightning_mst.memory.tensor_bytes import TensorBytes
from lightning_mst.rewrite.handle import Row

Group = Literal["attention", "MLP", "norm", "embedding", "LM head", "loss", "optimizer", "rest"]
GROUPS: tuple[Group, ...] = ("embedding", "norm", "attention", "MLP", "rest", "LM head", "loss", "optimizer")
"""Kinds of blocks, in the order in which a step meets them; ``"rest"`` is what the model does between its blocks."""

_PATTERNS: dict[Group, re.Pattern[str]] = {
    "norm": re.compile("norm|(^|_)ln(_|$)", re.IGNORECASE),
    "attention": re.compile("attn|attention|mixer", re.IGNORECASE),
    "MLP": re.compile("mlp|ff|feed_?forward|experts|moe", re.IGNORECASE),
    "embedding": re.compile("embed|wte|wpe", re.IGNORECASE),
    "LM head": re.compile("head", re.IGNORECASE),
}


@dataclass(frozen=True)
class Visit:
    """A stretch of a step in one place.

    Attributes:
        place: the place.
        group: what kind of block it is.
        live: bytes after each change.
    """

    place: Place
    group: Group
    live: tuple[int, ...]


@dataclass(frozen=True)
class Timeline:
    """The course of a step.

    Attributes:
        form: ``"standard"`` or ``"mini-sequences"``.
        source: ``"measured"`` or ``"modelled"``.
        persistent: bytes of weights, buffers and optimizer states.
        peak: the most bytes.
        place: where that was.
        visits: all of them, in order.
    """

    form: str
    source: str
    persistent: int
    peak: int
    place: Place
    visits: tuple[Visit, ...]

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file; every number of bytes is kept."""
        return {
            "form": self.form,
            "source": self.source,
            "peak_bytes": self.peak,
            "peak_where": str(self.place),
            "persistent_bytes": self.persistent,
            "visits": [{**v.place._asdict(), "group": v.group, "live_bytes": list(v.live)} for v in self.visits],
        }


def timeline_of(held: TensorBytes, groups: Mapping[Where, Group], *, form: str, source: str) -> Timeline:
    """The course of a step that was recorded.

    Args:
        held: with ``record=True`` and places.
        groups: of ``groups_of`` the same model.
        form: as of a ``Timeline``.
        source: as of a ``Timeline``.
    """
    events = [(event.place, event.live) for event in held.events if event.place is not None]
    visits: list[Visit] = []
    for place, changes in groupby(events, key=lambda event: event[0]):
        group = _group_of(place, groups, visits)
        visits.append(Visit(place, group, tuple(live for _, live in changes)))
    place, peak = max(held.peaks.items(), key=lambda item: item[1].total)
    persistent = min(
        sum(p.kinds.get(kind, 0) for kind in ("weights", "buffers", "optimizer_states")) for p in held.peaks.values()
    )
    return Timeline(form, source, persistent, peak.total, place, tuple(visits))


def groups_of(model: nn.Module, rows: Iterable[Row]) -> dict[Where, Group]:
    """What kind of block each place of a model is.

    Args:
        model: the model.
        rows: of its ``MSTHandle``, which knows MLPs and heads whatever they are called.
    """
    known: dict[str, Group] = {row.name: "MLP" if row.block == "MLP" else "LM head"
                               for row in rows if row.block in ("MLP", "LM head")}  # fmt: skip
    found: dict[Where, Group] = {}
    for module, where in blocks_of(model).items():
        name = ".".join(filter(None, where))
        found[where] = known.get(name) or _group_by_name(where[1], module) if where[1] else "rest"
    return found


def _group_of(place: Place, groups: Mapping[Where, Group], before: Sequence[Visit]) -> Group:
    """What kind of block is at work at a place, given the visits before it."""
    if place.phase == "optimizer":
        return "optimizer"
    if place.layer or place.block:
        return groups.get((place.layer, place.block), "rest")
    # In no block at all: the loss, if what comes before it in the forward and after it in the backward pass is the end.
    if place.phase == "forward":
        through = any(visit.group == "LM head" for visit in before) or "LM head" not in groups.values()
    else:
        through = all(visit.group == "loss" for visit in before if visit.place.phase == "backward")
    return "loss" if through else "rest"


def _group_by_name(key: str, module: nn.Module) -> Group:
    if isinstance(module, nn.Embedding):
        return "embedding"
    for text in (key.rpartition(".")[2], type(module).__name__):
        for group, pattern in _PATTERNS.items():
            if pattern.search(text):
                return group
    return "rest"
