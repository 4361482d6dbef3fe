"""Time per step and tokens per second, at equal batch and at the largest one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lightning_mst.report import paper
from lightning_mst.report.drawing import INK, differing, draw_bars, finish
from lightning_mst.report.read import Run
from lightning_mst.report.view import MODEL, Column, Row, Section, View, beside

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

_COLUMNS = (
    *MODEL,
    Column("sequence_length", "tokens", override="data.sequence_length"),
    Column("batch", "batch", override="task.batch"),
    Column("mst_name", "mst", override="mst"),
    Column("batch_size", "batch size", override="data.batch_size"),
    Column("fits", "fits"),
    Column("seconds_per_step", "s / step", ".4g"),
    Column("tokens_per_second", "tokens/s", ",.0f"),
    Column("paper", "paper (tokens/s)", ",.0f"),
    Column("ours_over_paper", "ours / paper", ".2f"),
    Column("peak_gib", "peak (GiB)", ".4g"),
    Column("memory_gib", "memory (GiB)", ".4g", override="task.memory"),
)


def _rows(runs: Sequence[Run]) -> Iterator[tuple[Run, Row]]:
    for run in runs:
        row: Row = {
            **{column.key: run.get(column.key) for column in _COLUMNS},
            **{key: run.get(key) for key in ("precision", "optimizer")},
            **beside(run.get("tokens_per_second"), paper.tokens_per_second(run)),
        }
        yield run, row


def _draw(figure: SubFigure, section: Section) -> None:
    groups = differing(section.rows, ("model", "sequence_length", "batch")) or ["batch"]
    timed = any(row["tokens_per_second"] for row in section.measured)
    panels = figure.subplots(1 + timed, 1, squeeze=False)[:, 0]
    if timed:
        draw_bars(
            panels[0], section.rows, "tokens_per_second", groups=groups, form="{:,.0f}".format,
            marker="paper", missing=_missing,
        )  # fmt: skip
        finish(panels[0], "Tokens per second, more is better")
    draw_bars(panels[-1], section.rows, "peak_gib", groups=groups, form="{:.3g}".format, missing=_missing)
    for budget in {row["memory_gib"] for row in section.measured} - {None}:
        panels[-1].axhline(budget, color=INK, lw=1, linestyle=(0, (4, 3)))
    finish(panels[-1], "Peak memory (GiB) and what there is (dashed), less is better")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)


def _missing(row: Row) -> str:
    if row["status"] != "completed":
        return "failed"
    return "not measured" if row["fits"] else "does not fit"


VIEW = View(
    title="Speed and memory of a training step",
    claims=lambda run: run.get("task") == "throughput",
    columns=lambda runs: _COLUMNS,
    rows=_rows,
    draw=_draw,
    has_paper=True,
    height=5.6,
)
