"""What the memory of a training step consists of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lightning_mst.report import paper
from lightning_mst.report.drawing import INK, differing, finish, label_of
from lightning_mst.report.read import Run
from lightning_mst.report.view import MODEL, Column, Row, Section, View, beside

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

_SETTINGS = ("model", "mst_name", "optimizer", "precision", "sequence_length", "batch_size")
_LASTING = ("weights", "gradients", "optimizer_states")
_KINDS = (*_LASTING, "activations")
_COLUMNS = (
    *MODEL,
    Column("mst_name", "mst", override="mst"),
    Column("optimizer", "optimizer", override="optimizer"),
    Column("sequence_length", "tokens", override="data.sequence_length"),
    *(Column(f"{kind}_gib", kind.replace("_", " "), ".4g", paper=f"paper_{kind}_gib") for kind in _KINDS),
    Column("predicted_peak_gib", "predicted peak", ".4g"),
    Column("measured_peak_gib", "measured peak", ".4g"),
    Column("paper", "paper", ".4g"),
    Column("ours_over_paper", "ours / paper", ".2f"),
)


def _rows(runs: Sequence[Run]) -> Iterator[tuple[Run, Row]]:
    for run in runs:
        figures = paper.memory_gib(run)
        # The device's overhead is no tensor, and the paper counts tensors.
        kinds = {kind: gib for kind, gib in run.get("kinds_gib").items() if kind != "overhead"}
        ours = {kind: kinds[kind] for kind in _LASTING}
        ours["activations"] = sum(gib for kind, gib in kinds.items() if kind not in _LASTING)
        predicted, measured = sum(kinds.values()), run.get("measured_peak_gib")
        row: Row = {
            **{key: run.get(key) for key in (*_SETTINGS, "layers", "shrink")},
            **{f"{kind}_gib": gib for kind, gib in ours.items()},
            **{f"paper_{kind}_gib": figures.get(kind) for kind in ours},
            "predicted_peak_gib": predicted,
            "measured_peak_gib": measured,
            "where": run.get("where"),
            "how": "predicted" if measured is None else "predicted and measured",
            **beside(predicted if measured is None else measured, figures.get("peak")),
        }
        yield run, row


def _draw(figure: SubFigure, section: Section) -> None:
    from lightning_mst.program.plan_plot import KINDS  # imports matplotlib

    axes = figure.subplots()
    named = differing([run.result for run in section.runs], _SETTINGS) or ["mst_name"]
    labels = []
    for y, run in enumerate(section.runs):
        figures = paper.memory_gib(run)
        labels.append(label_of(run.result, named, "\n"))
        left = 0.0
        for kind, (_, color) in KINDS.items():
            gib = run.get("kinds_gib").get(kind, 0.0)
            axes.barh(y - 0.18 * bool(figures), gib, left=left, height=0.36, color=color, edgecolor="white", lw=0.6)
            left += gib
        if run.get("measured_peak_gib") is not None:
            axes.plot(run.get("measured_peak_gib"), y - 0.18 * bool(figures), marker="o", markersize=5, color=INK)
        if figures:
            left = 0.0
            for kind in _KINDS:
                color = KINDS["activations_kept" if kind == "activations" else kind][1]
                gib = figures.get(kind, 0.0)
                axes.barh(y + 0.18, gib, left=left, height=0.3, color=color, alpha=0.4, hatch="///", edgecolor="white")
                left += gib
            axes.plot(figures["peak"], y + 0.18, marker="D", markersize=5, color=INK)
    for kind, (label, color) in KINDS.items():
        if any(run.get("kinds_gib").get(kind) for run in section.runs):
            axes.barh(0, 0, color=color, label=label)
    if any(run.get("measured_peak_gib") is not None for run in section.runs):
        axes.plot([], [], "o", markersize=5, color=INK, label="measured peak")
    if any(paper.memory_gib(run) for run in section.runs):
        axes.barh(0, 0, color=INK, alpha=0.3, hatch="///", edgecolor="white", label="the paper, as far as it says")
        axes.plot([], [], "D", markersize=5, color=INK, label="the paper's peak")
    axes.set_xlim(0, 1.04 * axes.dataLim.x1)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    finish(axes, "Memory at the peak of a training step (GiB): bars are predicted")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)


VIEW = View(
    title="Where the memory goes",
    claims=lambda run: run.get("task") == "breakdown",
    columns=lambda runs: _COLUMNS,
    rows=_rows,
    draw=_draw,
    notes=(
        "GiB of tensors at the peak of a step, as predicted; the peak was measured as well where it says so. In"
        " brackets, the paper's figures. Activations are all that is neither weights, gradients nor optimizer states.",
    ),
    has_paper=True,
)
