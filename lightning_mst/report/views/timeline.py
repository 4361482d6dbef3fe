"""Memory over the course of one training step, all settings in one panel."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lightning_mst.report.drawing import INK, colors_of, differing, finish, label_of
from lightning_mst.report.read import Run
from lightning_mst.report.view import Column, Row, Section, View
from lightning_mst.units import GIB

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

_FILE = "memory_timeline.json"
_COLUMNS = (
    Column("model", "model", override="model"),
    Column("parameters", "parameters", override="model.config"),
    Column("sequence_length", "tokens", override="data.sequence_length"),
    Column("mst_name", "mst", override="mst"),
    Column("peak_gib", "peak (GiB)", ".4g"),
    Column("where", "at"),
    Column("persistent_gib", "weights and states (GiB)", ".4g"),
    Column("tokens_per_second", "tokens/s", ",.0f"),
)
_POINTS = 40  # of one visit of a block; more are not seen


def _timelines(run: Run) -> list[dict[str, Any]]:
    path = run.folder / _FILE
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["timelines"]
    return found


def _chosen(runs: Sequence[Run]) -> list[tuple[Run, str, dict[str, Any]]]:
    """What each run has measured; first the standard form as it was modelled, if no run has measured that."""
    chosen = [(run, str(run.get("mst_name")), line) for run in runs for line in _timelines(run)]
    if not any(line["form"] == "standard" and line["source"] == "measured" for _, _, line in chosen):
        modelled = [(run, "off", line) for run, _, line in chosen if line["source"] != "measured"][:1]
    else:
        modelled = []
    return modelled + [entry for entry in chosen if entry[2]["source"] == "measured"]


def _rows(runs: Sequence[Run]) -> Iterator[tuple[Run, Row]]:
    chosen = _chosen(runs)
    for run, name, line in chosen:
        modelled = line["source"] != "measured"
        row: Row = {
            **{key: run.get(key) for key in ("model", "parameters", "sequence_length")},
            "mst_name": name,
            "peak_gib": line["peak_bytes"] / GIB,
            "where": line["peak_where"],
            "persistent_gib": line["persistent_bytes"] / GIB,
            "tokens_per_second": None if modelled else run.get("tokens_per_second"),
            "how": line["source"],
        }
        yield run, row
    for run in runs:
        if not any(run is other for other, _, line in chosen if line["source"] == "measured"):
            yield run, {key: run.get(key) for key in ("model", "sequence_length", "mst_name", "tokens_per_second")}


def _draw(figure: SubFigure, section: Section) -> None:
    axes = figure.subplots()
    chosen = _chosen(section.runs)
    colors = colors_of([name for _, name, _ in chosen])
    named = differing([run.result for run in section.runs], ("model", "sequence_length", "precision"))
    shares = _shares(chosen[0][2]) if chosen else {}
    highest = 0.0
    for run, name, line in chosen:
        xs, ys = _course(line, shares)
        peak = line["peak_bytes"] / GIB
        highest = max(highest, peak)
        label = ", ".join(filter(None, (f"mst={name}", label_of(run.result, named))))
        how = "" if line["source"] == "measured" else f" ({line['source']})"
        axes.plot(
            xs, ys, lw=1.1, color=colors[name], label=f"{label}{how}: peak {peak:.3g} GiB", drawstyle="steps-post"
        )
    begin = 0.0
    for phase, share in shares.items():
        if begin:
            axes.axvline(begin, color=INK, lw=0.8, linestyle=(0, (4, 3)))
        axes.text(
            begin + share / 2, 1.0, phase, ha="center", va="bottom", fontsize=8.5, color=INK,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
        begin += share
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.1 * highest or 1.0)
    axes.set_xticks([])
    axes.set_ylabel("tensors alive (GiB)", fontsize=8.5, color=INK)
    finish(axes, "")
    if chosen:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)


def _phases(line: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The visits of each phase; an optimizer step inside of the backward pass belongs to that."""
    visits = line["visits"]
    last = max((index for index, visit in enumerate(visits) if visit["phase"] == "backward"), default=-1)
    phases: dict[str, list[dict[str, Any]]] = {}
    for index, visit in enumerate(visits):
        phase = "backward" if visit["phase"] == "optimizer" and index < last else visit["phase"]
        phases.setdefault(phase, []).append(visit)
    return phases


def _shares(line: dict[str, Any]) -> dict[str, float]:
    """How much of the panel's width a phase gets, in all courses: modelled work takes no time."""
    weights = {phase: 0.12 if phase == "optimizer" else 1.0 for phase in _phases(line)}
    return {phase: weight / sum(weights.values()) for phase, weight in weights.items()}


def _course(line: dict[str, Any], shares: dict[str, float]) -> tuple[list[float], list[float]]:
    """Points of a step: a phase's blocks in the order of their work, each as wide as the other."""
    xs: list[float] = []
    ys: list[float] = []
    begin = 0.0
    phases = _phases(line)
    for phase, share in shares.items():
        visits = phases.get(phase, [])
        for index, visit in enumerate(visits):
            values = _thinned(visit["live_bytes"])
            for position, value in enumerate(values):
                xs.append(begin + share * (index + position / len(values)) / len(visits))
                ys.append(value / GIB)
        begin += share
        xs.append(begin)
        ys.append(ys[-1])
    return xs, ys


def _thinned(values: list[int]) -> list[int]:
    """The highest of short stretches, so that no peak is lost."""
    size = -(-len(values) // _POINTS)
    return [max(values[i : i + size]) for i in range(0, len(values), size)]


VIEW = View(
    title="Memory over one training step",
    claims=lambda run: run.topic == "timeline",
    columns=lambda runs: _COLUMNS,
    rows=_rows,
    draw=_draw,
    notes=("Bytes of tensors. Blocks in the order of their work, each phase with the same width for all settings.",),
)
