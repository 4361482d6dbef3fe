"""The sections of a report as text: CSV, Markdown, and tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from lightning_mst.program.tables import console
from lightning_mst.report.view import Row, Section

__all__ = ["all_rows", "show", "to_markdown"]

_LAST = ("paper", "ours_over_paper", "how", "device", "date", "error")


def all_rows(sections: Sequence[Section]) -> list[Row]:
    """The rows of all sections with the same keys in each, numbers in full: what the CSV file holds."""
    keys = {key: None for section in sections for row in section.rows for key in row}
    order = [*(key for key in keys if key not in _LAST), *(key for key in _LAST if key in keys)]
    return [{key: row.get(key) for key in order} for section in sections for row in section.rows]


def to_markdown(title: str, sections: Sequence[Section], *, picture: str | None) -> str:
    """A page with a table for each section.

    Args:
        title: Of the page.
        sections: What it holds.
        picture: The file to show above the tables.
    """
    blocks = [f"# {title}"]
    if picture:
        blocks.append(f"![{title}]({picture})")
    for section in sections:
        lines = [
            [column.title for column in section.columns],
            ["---" if index == 0 else "---:" for index in range(len(section.columns))],
            *([column.text(row).replace("|", "\\|") for column in section.columns] for row in section.rows),
        ]
        blocks += [f"## {section.title}", *section.lines, "\n".join(f"| {' | '.join(line)} |" for line in lines)]
        blocks += _failures(section)
    return "\n\n".join(blocks) + "\n"


def show(section: Section) -> None:
    """Print a section."""
    terminal = console()
    terminal.print(f"\n[bold]{escape(section.title)}[/bold]", highlight=False)
    for line in section.lines:
        terminal.print(escape(line), style="dim", highlight=False)
    table = Table()
    for index, column in enumerate(section.columns):
        table.add_column(escape(column.title), justify="left" if index == 0 else "right", overflow="fold")
    for row in section.rows:
        table.add_row(*(escape(column.text(row)) for column in section.columns))
    terminal.print(table)
    for failure in _failures(section):
        terminal.print(escape(failure), style="red", highlight=False)


def _failures(section: Section) -> list[str]:
    """A paragraph for each error, with the runs that it ended."""
    runs: dict[str, list[str]] = {}
    for row in section.rows:
        if row["status"] != "completed":
            runs.setdefault(str(row["error"]), []).append(row["run"])
    return [f"Failed: {', '.join(names)}. {error}" for error, names in runs.items()]
