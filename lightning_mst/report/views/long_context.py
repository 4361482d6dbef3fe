"""Perplexity against context length, after training with short and with long contexts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lightning_mst.report.drawing import PALETTE, differing, draw_lines, finish, label_of, length_ticks
from lightning_mst.report.read import Run
from lightning_mst.report.view import Column, Row, Section, View

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

_SETTINGS = (
    Column("model", "model", override="model"),
    Column("parameters", "parameters", override="model.config"),
    Column("sequence_length", "trained at", override="data.sequence_length"),
    Column("mst_name", "mst", override="mst"),
    Column("batch_size", "batch size", override="data.batch_size"),
    Column("steps", "steps", override="trainer.max_steps"),
    Column("loss", "last loss", ".4f"),
)
_LAST = (Column("tokens_per_second", "tokens/s", ",.0f"), Column("peak_memory_gib", "peak (GiB)", ".4g"))


def _contexts(runs: Sequence[Run]) -> list[int]:
    return sorted({int(length) for run in runs for length in run.get("context_perplexity") or {}})


def _columns(runs: Sequence[Run]) -> list[Column]:
    contexts = [Column(f"perplexity_{length}", f"ppl at {length:,}", ",.4g") for length in _contexts(runs)]
    return [*_SETTINGS, *contexts, *_LAST]


def _rows(runs: Sequence[Run]) -> Iterator[tuple[Run, Row]]:
    for run in runs:
        perplexities = run.get("context_perplexity") or {}
        row: Row = {
            **{column.key: run.get(column.key) for column in (*_SETTINGS, *_LAST)},
            **{f"perplexity_{length}": perplexities.get(str(length)) for length in _contexts(runs)},
        }
        yield run, row


def _draw(figure: SubFigure, section: Section) -> None:
    axes = figure.subplots()
    results = [run.result for run in section.runs]
    named = differing(results, ("model", "sequence_length", "mst_name", "seed")) or ["sequence_length"]
    lines: dict[str, list[tuple[float, float]]] = {}
    for run in section.runs:
        points = (run.get("context_perplexity") or {}).items()
        label = f"trained at {label_of(run.result, named)} (run {run.number})"
        lines[label] = [(int(length), value) for length, value in points if value is not None]
    draw_lines(axes, lines, {label: PALETTE[index % len(PALETTE)] for index, label in enumerate(lines)})
    if _contexts(section.runs):
        length_ticks(axes, _contexts(section.runs))
    axes.set_xlabel("context length (tokens)", fontsize=8.5)
    finish(axes, "Perplexity of the held-out text, less is better", legend=any(lines.values()))


VIEW = View(
    title="Short and long training contexts",
    claims=lambda run: run.topic == "long_context",
    columns=_columns,
    rows=_rows,
    draw=_draw,
    notes=("ppl: perplexity of the same held-out text, cut into contexts of each length.",),
)
