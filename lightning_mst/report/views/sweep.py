"""Any other runs: what they differ in, loss, perplexity, speed and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lightning_mst.program.sweep import MEASUREMENTS
from lightning_mst.report.drawing import PALETTE, differing, draw_lines, finish, from_zero, label_of, number_ticks
from lightning_mst.report.read import Run
from lightning_mst.report.view import Column, Row, Section, View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

_SETTINGS = (
    "model",
    "mst_name",
    "precision",
    "sequence_length",
    "batch_size",
    "strategy",
    "devices",
    "adapter",
    "seed",
)
_MEASURED = tuple(Column(key, title, f",.{digits}f") for key, (title, digits) in MEASUREMENTS.items())
_PANELS = {
    "peak_memory_gib": "Peak memory (GiB), less is better",
    "tokens_per_second": "Tokens per second, more is better",
}


def _columns(runs: Sequence[Run]) -> list[Column]:
    """Settings where no overrides tell runs apart: a single run, or results that were kept without Hydra's files."""
    if len(runs) > 1 and any(run.overrides for run in runs):
        return list(_MEASURED)
    settings = differing([run.result for run in runs], _SETTINGS) or _SETTINGS[:4]
    return [*(Column(key, key.removesuffix("_name").replace("_", " ")) for key in settings), *_MEASURED]


def _rows(runs: Sequence[Run]) -> Iterator[tuple[Run, Row]]:
    for run in runs:
        yield run, {key: run.get(key) for key in (*_SETTINGS, *MEASUREMENTS)}


def _draw(figure: SubFigure, section: Section) -> None:
    panels = figure.subplots(1, 2)
    axis = next((key for key in section.swept if _is_axis(section, key)), None)
    for axes, (measurement, title) in zip(panels, _PANELS.items(), strict=True):
        if axis:
            _lines(axes, section, axis, measurement)
        else:
            _bars(axes, section, measurement)
        finish(axes, title, legend=False)
    if axis:
        handles, labels = panels[0].get_legend_handles_labels()
        if len(labels) > 1:
            figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    else:
        panels[0].grid(axis="y", visible=False)
        panels[1].grid(axis="y", visible=False)


def _is_axis(section: Section, key: str) -> bool:
    values = {row[key] for row in section.measured}
    return len(values) > 1 and all(_number(value) is not None for value in values)


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _lines(axes: Axes, section: Section, axis: str, measurement: str) -> None:
    others = [key for key in section.swept if key != axis]
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in section.measured:
        x, y = _number(row[axis]), row[measurement]
        points = lines.setdefault(label_of(row, others), [])
        if x is not None and y is not None:
            points.append((x, y))
    draw_lines(axes, lines, {label: PALETTE[index % len(PALETTE)] for index, label in enumerate(lines)})
    number_ticks(axes, [x for row in section.measured if (x := _number(row[axis])) is not None])
    from_zero(axes)
    axes.set_xlabel(axis, fontsize=8.5)


def _bars(axes: Axes, section: Section, measurement: str) -> None:
    rows = section.measured
    named = list(section.swept) or differing(rows, _SETTINGS)
    values = [row[measurement] for row in rows]
    drawn = axes.barh(range(len(rows)), [value or 0.0 for value in values], color=PALETTE[0], height=0.62)
    labels = ["not measured" if value is None else f"{value:,.4g}" for value in values]
    axes.bar_label(drawn, labels, padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [label_of(row, named) or row["run"] for row in rows])
    axes.set_xlim(0, 1.2 * max((value or 0.0 for value in values), default=0.0) or 1.0)
    axes.invert_yaxis()


VIEW = View(title="Runs", claims=lambda run: True, columns=_columns, rows=_rows, draw=_draw)
