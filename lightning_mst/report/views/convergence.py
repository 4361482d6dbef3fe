"""The same training with and without mini-sequences: loss curves laid over each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lightning_mst.report.drawing import FAINT, INK, PALETTE, differing, finish, label_of, whole_decades
from lightning_mst.report.read import Run
from lightning_mst.report.view import Column, Row, Section, View

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

_COLUMNS = (
    Column("model", "model", override="model"),
    Column("parameters", "parameters", override="model.config"),
    Column("mst_name", "mst", override="mst"),
    Column("sequence_length", "tokens", override="data.sequence_length"),
    Column("seed", "seed", override="seed"),
    Column("steps", "steps", override="trainer.max_steps"),
    Column("first_loss", "first loss", ".5f"),
    Column("loss", "last loss", ".5f"),
    Column("val_perplexity", "val perplexity", ",.3f"),
    Column("difference", "largest difference", ".1e"),
    Column("compared", "to"),
    Column("tokens_per_second", "tokens/s", ",.0f"),
    Column("peak_memory_gib", "peak (GiB)", ".4g"),
)
# What has to be the same for two curves to be the same: results, and parts of the configuration where it was kept.
_RESULTS = ("seed", "model", "parameters", "precision", "sequence_length", "batch_size", "devices", "steps")
_CONFIG = ("data", "optimizer", "scheduler", "adapter", "quantization")


def _rows(runs: Sequence[Run]) -> Iterator[tuple[Run, Row]]:
    for run in runs:
        losses = run.get("losses") or []
        other, reason = _reference(run, runs)
        differences = _differences(run, other) if other else []
        row: Row = {
            **{column.key: run.get(column.key) for column in _COLUMNS},
            "precision": run.get("precision"),
            "first_loss": losses[0] if losses else None,
            "difference": max(differences, default=None),
            "compared": f"run {other.number}" if other else reason,
        }
        yield run, row


def _reference(run: Run, runs: Sequence[Run]) -> tuple[Run | None, str | None]:
    """The run without mini-sequences to compare with (mst=off, or recompute where that does not fit), or why not."""
    names = [other.get("mst_name") for other in runs]
    plain = next((name for name in ("off", "recompute") if name in names), None)
    if plain is None:
        return None, "no run without mini-sequences"
    if run.get("mst_name") == plain:
        return None, None
    references = [other for other in runs if other.get("mst_name") == plain]
    obstacles = [_obstacle(run, other) for other in references]
    comparable = [other for other, obstacle in zip(references, obstacles, strict=True) if obstacle is None]
    return (comparable[0], None) if comparable else (None, f"not comparable: {obstacles[0]}")


def _obstacle(run: Run, other: Run) -> str | None:
    for key in _RESULTS:
        if run.get(key) != other.get(key):
            return f"{key} {run.get(key)}, {other.get(key)} in run {other.number}"
    for part in _CONFIG:
        if run.config and other.config and run.config.get(part) != other.config.get(part):
            return f"other settings of {part} than in run {other.number}"
    if len(run.get("losses") or []) != len(other.get("losses") or []):
        return f"not as many losses as in run {other.number}"
    for which in (run, other):
        if not which.get("losses") or any(loss is None for loss in which.get("losses")):
            return f"run {which.number} has steps without a finite loss"
    return None


def _differences(run: Run, other: Run) -> list[float]:
    return [abs(a - b) for a, b in zip(run.get("losses"), other.get("losses"), strict=True)]


def _draw(figure: SubFigure, section: Section) -> None:
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    named = [
        "mst_name",
        *differing([run.result for run in section.runs], ("model", "precision", "sequence_length", "seed")),
    ]
    others = 0
    compared = differs = False
    for run in section.runs:
        losses: list[Any] = run.get("losses") or []
        steps = range(1, len(losses) + 1)
        values = [float("nan") if loss is None else loss for loss in losses]
        label = label_of(run.result, named)
        other, reason = _reference(run, section.runs)
        if other is None and reason is None:
            above.plot(steps, values, color=FAINT, lw=5, label=label)
            continue
        color = PALETTE[others % len(PALETTE)]
        others += 1
        # Thinner from one to the next, so that each is seen where all are the same.
        above.plot(steps, values, color=color, lw=max(0.8, 3.4 - 1.2 * others), label=label)
        if other:
            compared = True
            # Where there is no difference at all, a logarithmic axis has no place for it.
            differences = [value or float("nan") for value in _differences(run, other)]
            differs |= any(_differences(run, other))
            below.plot(steps, differences, ".", markersize=4, color=color, label=label)
    finish(above, "Loss", legend=True)
    about = "Difference to the run without mini-sequences (no point where there is none)"
    finish(below, about if compared else "No two runs to compare")
    if differs:
        whole_decades(below)
    below.set_xlabel("step", fontsize=8.5, color=INK)


VIEW = View(
    title="The same training with and without mini-sequences",
    claims=lambda run: run.topic == "convergence",
    columns=lambda runs: _COLUMNS,
    rows=_rows,
    draw=_draw,
    notes=("Difference: between the losses of a step with and without mini-sequences, the largest of all steps.",),
    height=5.2,
)
