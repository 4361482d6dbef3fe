"""What a kind of experiment looks like in a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_mst.report.read import Run

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

__all__ = ["MODEL", "Column", "Row", "Section", "View", "beside"]

Row = dict[str, Any]
"""Column -> value: text, a number in full, or None for what was not measured."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: Of the rows, and the heading in the CSV file.
        title: The heading for people, with the unit.
        form: How numbers are written, as in an f-string.
        override: The Hydra key that this column shows, so that a sweep over it needs no other one. Such a setting is
            said above the table where all rows share it.
        paper: The key of the paper's figure, which is written in brackets behind ours.
    """

    key: str
    title: str
    form: str = ","
    override: str | None = None
    paper: str | None = None

    def text(self, row: Row) -> str:
        """The value in a row, as it is written."""
        value = row[self.key]
        if value is None:
            return "-"
        if isinstance(value, bool):
            return "yes" if value else "no"
        text = f"{value:{self.form}}" if isinstance(value, (int, float)) else str(value)
        figure = row.get(self.paper) if self.paper else None
        return text if figure is None else f"{text} ({figure:{self.form}})"


MODEL = (
    Column("model", "model", override="model"),
    Column("layers", "layers", override="model.config.num_hidden_layers"),
    Column("shrink", "widths divided by", override="model.shrink"),
)
"""Which model a run was about, and how much smaller than the real one. Training runs count its parameters instead."""


@dataclass(frozen=True)
class View:
    """One kind of experiment.

    Attributes:
        title: Of its tables.
        claims: Whether a run is of this kind.
        columns: The columns to show, given the completed runs; those without any value are left out.
        rows: The rows of completed runs, each with the run it belongs to.
        draw: Draws a section with completed runs into a part of the picture.
        notes: Sentences below the title.
        has_paper: Whether the paper has figures of this kind.
        height: Of the drawing, in inches.
    """

    title: str
    claims: Callable[[Run], bool]
    columns: Callable[[Sequence[Run]], Sequence[Column]]
    rows: Callable[[Sequence[Run]], Iterable[tuple[Run, Row]]]
    draw: Callable[[SubFigure, Section], None]
    notes: tuple[str, ...] = ()
    has_paper: bool = False
    height: float = 3.6


@dataclass(frozen=True)
class Section:
    """The runs of one sweep or experiment, as a table.

    Attributes:
        view: What they are.
        title: Above the table.
        made: How, where and when, as far as the runs share it.
        lines: Below the title: with what, and what the numbers mean.
        columns: What to show of the rows.
        rows: Of all runs, failed ones as well. Besides what the view says, each has ``experiment``, ``run``,
            ``folder``, ``status``, the swept keys, ``how``, ``device``, ``date`` and ``error``.
        runs: The completed ones.
        swept: The Hydra keys that the runs differ in.
    """

    view: View
    title: str
    made: str
    lines: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    runs: tuple[Run, ...]
    swept: tuple[str, ...]

    @property
    def measured(self) -> list[Row]:
        """The rows of the completed runs."""
        return [row for row in self.rows if row["status"] == "completed"]


def beside(ours: float | None, paper: float | None) -> Row:
    """The paper's figure and the ratio of ours to it."""
    return {"paper": paper, "ours_over_paper": ours / paper if ours is not None and paper else None}
