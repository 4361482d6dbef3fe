"""The longest sequences that can be trained: plain, with accumulated gradients, with quantized weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lightning_mst.report import paper
from lightning_mst.report.drawing import differing, draw_bars, finish
from lightning_mst.report.read import Run
from lightning_mst.report.view import MODEL, Column, Row, Section, View, beside

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

_COLUMNS = (
    *MODEL,
    Column("quantization", "weights", override="quantization"),
    Column("accumulate_grad_batches", "accumulated", override="trainer.accumulate_grad_batches"),
    Column("mst_name", "mst", override="mst"),
    Column("longest", "longest (tokens)"),
    Column("paper", "paper (tokens)"),
    Column("ours_over_paper", "ours / paper", ".2f"),
    Column("over_standard", "ours / off", ".1f"),
    Column("paper_over_standard", "paper: mst / standard", ".1f"),
    Column("peak_gib", "peak (GiB)", ".4g"),
    Column("memory_gib", "memory (GiB)", ".4g", override="task.memory"),
)
# What two runs have to share for their lengths to be set against each other.
_SAME = (
    "model", "quantization", "adapter", "precision", "optimizer", "accumulate_grad_batches", "batch_size",
    "memory_gib", "how",
)  # fmt: skip


def _rows(runs: Sequence[Run]) -> Iterator[tuple[Run, Row]]:
    off = {_kind(run): run.get("longest") for run in runs if run.get("mst_name") == "off"}
    for run in runs:
        standard = off.get(_kind(run))
        row: Row = {
            **{column.key: run.get(column.key) for column in _COLUMNS},
            **{key: run.get(key) for key in _SAME[2:-1]},
            **beside(run.get("longest"), paper.longest(run)),
            "over_standard": run.get("longest") / standard if standard else None,
            "paper_over_standard": paper.over_standard(run),
        }
        yield run, row


def _kind(run: Run) -> tuple[object, ...]:
    return tuple(run.get(key) for key in _SAME)


def _draw(figure: SubFigure, section: Section) -> None:
    axes = figure.subplots()
    groups = differing(section.rows, ("model", "quantization", "accumulate_grad_batches")) or ["model"]
    draw_bars(
        axes, section.rows, "longest", groups=groups, form="{:,}".format, marker="paper",
        missing=lambda row: "failed",
    )  # fmt: skip
    axes.yaxis.set_major_formatter("{x:,.0f}")
    finish(axes, "Longest sequence (tokens), more is better")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)


VIEW = View(
    title="Longest sequences",
    claims=lambda run: run.get("task") == "longest",
    columns=lambda runs: _COLUMNS,
    rows=_rows,
    draw=_draw,
    has_paper=True,
)
