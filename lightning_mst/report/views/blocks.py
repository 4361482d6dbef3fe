"""The LM head with its loss, or one MLP, by itself: standard and in M mini-sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lightning_mst.report import paper
from lightning_mst.report.drawing import (
    INK,
    amount_ticks,
    differing,
    draw_lines,
    finish,
    from_zero,
    label_of,
    length_ticks,
)
from lightning_mst.report.read import Run
from lightning_mst.report.view import Column, Row, Section, View, beside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

_COLUMNS = (
    Column("block", "block", override="task.block"),
    Column("model", "model", override="model"),
    Column("hidden_size", "D", override="model.config.hidden_size"),
    Column("intermediate_size", "I", override="model.config.intermediate_size"),
    Column("vocab_size", "V", override="model.config.vocab_size"),
    Column("sequence_length", "tokens", override="data.sequence_length"),
    Column("form", "form"),
    Column("seconds", "seconds", ".4g"),
    Column("time_over_standard", "time / standard", ".2f"),
    Column("peak_gib", "peak (GiB)", ".4g"),
    Column("peak_over_standard", "peak / standard", ".2f"),
    Column("paper", "paper (GiB)", ".4g"),
    Column("ours_over_paper", "ours / paper", ".2f"),
)
# Matplotlib's viridis from dark to light, whose order people with any kind of colour vision see.
_SHADES = ("#440154", "#3b528b", "#21918c", "#5ec962", "#b5de2b", "#fde725")


def _rows(runs: Sequence[Run]) -> Iterator[tuple[Run, Row]]:
    for run in runs:
        tokens = run.get("sequence_length") * (run.get("batch_size") or 1)
        forms = {form["num_chunks"]: form for form in run.get("rows")}
        for chunks, form in forms.items():
            seconds = form["seconds"]
            row: Row = {
                **{key: run.get(key) for key in ("block", "model", "sequence_length")},
                "form": "standard" if chunks is None else f"M = {chunks}",
                "num_chunks": chunks,
                "seconds": seconds,
                "microseconds": None if seconds is None else 1e6 * seconds / tokens,
                "time_over_standard": _ratio(form, forms.get(None), "seconds"),
                "peak_gib": form["peak_gib"],
                "peak_over_standard": _ratio(form, forms.get(None), "peak_gib"),
                **{key: run.get(key) for key in ("hidden_size", "intermediate_size", "vocab_size", "precision")},
                **beside(form["peak_gib"], paper.block_gib(run, chunks)),
            }
            yield run, row


def _ratio(form: Row, standard: Row | None, key: str) -> float | None:
    return form[key] / standard[key] if standard and standard[key] and form[key] is not None else None


def _draw(figure: SubFigure, section: Section) -> None:
    rows = section.measured
    timed = any(row["seconds"] is not None for row in rows)
    panels = figure.subplots(1, 1 + timed, squeeze=False)[0]
    _memory(panels[0], rows)
    if timed:
        _time(panels[1], rows)
    for axes in panels:
        length_ticks(axes, [row["sequence_length"] for row in rows])


def _memory(axes: Axes, rows: Sequence[Row]) -> None:
    lines, colors = _lines(rows, "peak_gib"), _colors(rows)
    draw_lines(axes, lines, colors)
    marked = [row for row in rows if row["paper"] is not None]
    for row in marked:
        color = colors[_name(row, rows)]
        axes.plot(
            row["sequence_length"], row["paper"], "D", markersize=8, markerfacecolor="none", markeredgewidth=1.4,
            markeredgecolor=color,
        )  # fmt: skip
    if marked:
        axes.plot([], [], "D", markersize=8, markerfacecolor="none", color=INK, label="the paper's figure")
    amount_ticks(axes, [point for line in lines.values() for _, point in line])
    finish(axes, "Peak memory (GiB) of forward and backward pass, less is better", legend=True)


def _time(axes: Axes, rows: Sequence[Row]) -> None:
    draw_lines(axes, _lines(rows, "microseconds"), _colors(rows))
    from_zero(axes)
    finish(axes, "Microseconds per token of forward and backward pass, less is better")


def _lines(rows: Sequence[Row], key: str) -> dict[str, list[tuple[float, float]]]:
    """Sequence length and value of each form that was measured, by the form's name."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points = lines.setdefault(_name(row, rows), [])
        if row[key] is not None:
            points.append((row["sequence_length"], row[key]))
    return lines


def _colors(rows: Sequence[Row]) -> dict[str, str]:
    """Darker with more mini-sequences; black for the standard form."""
    chunks = sorted({row["num_chunks"] for row in rows} - {None}, reverse=True)
    shades = {number: _SHADES[round(5 * index / max(1, len(chunks)))] for index, number in enumerate(chunks)}
    return {_name(row, rows): shades.get(row["num_chunks"], INK) for row in rows}


def _name(row: Row, rows: Sequence[Row]) -> str:
    return label_of(row, [*differing(rows, ("block", "model")), "form"])


VIEW = View(
    title="One block by itself",
    claims=lambda run: run.get("task") == "block",
    columns=lambda runs: _COLUMNS,
    rows=_rows,
    draw=_draw,
    notes=(
        "Forward and backward pass of the block alone, with its weights and its input. M: mini-sequences. The paper's"
        " standard LM head is its forward pass without the loss.",
    ),
    has_paper=True,
)
