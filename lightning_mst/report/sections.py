"""Sorts runs into sections, one for each sweep or experiment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning_mst.program.sweep import swept_keys
from lightning_mst.report.paper import CARD
from lightning_mst.report.read import Run
from lightning_mst.report.view import Column, Row, Section, View
from lightning_mst.report.views import VIEWS

__all__ = ["sections_of"]

_PROVENANCE = (Column("how", "how"), Column("device", "device"), Column("date", "date"))


def sections_of(runs: Sequence[Run]) -> list[Section]:
    """The sections of a report, in the order of ``VIEWS``.

    Runs of one sweep belong together. So do single runs of one experiment, and other single runs that lie in one
    folder.
    """
    groups: dict[tuple[int, str, str], list[Run]] = {}
    for run in runs:
        view = next(index for index, view in enumerate(VIEWS) if view.claims(run))
        place = run.sweep or ("" if run.experiment else run.folder.resolve().parent)
        groups.setdefault((view, run.experiment or "", str(place)), []).append(run)
    return [_section(VIEWS[key[0]], groups[key]) for key in sorted(groups)]


def _section(view: View, runs: list[Run]) -> Section:
    completed = [run for run in runs if run.completed]
    columns = list(view.columns(completed))
    # A single run is no sweep, and the experiment is in the title.
    swept = [key for key in swept_keys([run.overrides for run in runs]) if key != "experiment" and len(runs) > 1]
    extra = [Column(key, key) for key in swept if key not in {column.override for column in columns}]
    rows = _rows(view, runs, columns, extra)
    shared = [column for column in columns if column.override and len(rows) > 1 and not _differs(column, rows)]
    shown = [Column("run", "run"), *extra, *(column for column in columns if column not in shared)]
    shown += [column for column in _PROVENANCE if _differs(column, rows)]
    if 0 < len(completed) < len(runs):
        shown.append(Column("status", "status"))
    return Section(
        view=view,
        title=f"{view.title} ({runs[0].experiment or runs[0].place})",
        made=_made(rows),
        lines=tuple(_lines(view, runs, rows, shared)),
        columns=tuple(column for column in shown if any(row[column.key] is not None for row in rows)),
        rows=tuple(rows),
        runs=tuple(completed),
        swept=tuple(swept),
    )


def _rows(view: View, runs: Sequence[Run], columns: Sequence[Column], extra: Sequence[Column]) -> list[Row]:
    """The rows of all runs in their order; a failed run has one that says what it was meant to be."""
    found: dict[str, list[Row]] = {run.name: [] for run in runs}
    for run, row in view.rows([run for run in runs if run.completed]):
        found[run.name].append(row)
    rows: list[Row] = []
    for run in runs:
        meant = {column.key: run.get(column.key) for column in columns}
        swept = {column.key: run.overrides.get(column.key) for column in extra}
        rows += [_common(run) | meant | row | swept for row in found[run.name] or [{}]]
    return rows


def _differs(column: Column, rows: Sequence[Row]) -> bool:
    """Whether a column tells rows apart; a failed run may not know its value."""
    known = {row[column.key] for row in rows if row["status"] == "completed" or row[column.key] is not None}
    return len(known) > 1


def _common(run: Run) -> Row:
    return {
        "experiment": run.experiment,
        "run": run.number,
        "folder": run.name,
        "status": run.get("status"),
        "how": run.get("how") or ("measured" if run.completed else None),
        "device": run.get("device"),
        "date": run.get("date"),
        "error": run.get("error"),
    }


def _made(rows: Sequence[Row]) -> str:
    """How, on which device and when; several ways are told apart by a column."""
    completed = [row for row in rows if row["status"] == "completed"]
    ways = " and ".join(dict.fromkeys(row["how"] for row in completed))
    others = [{row[key] for row in completed} for key in ("device", "date")]
    return ", ".join(filter(None, [ways, *(values.pop() for values in others if len(values) == 1)]))


def _lines(view: View, runs: Sequence[Run], rows: Sequence[Row], shared: Sequence[Column]) -> Iterator[str]:
    """With what the runs were made, and what the numbers mean."""
    versions: dict[str, set[str]] = {}
    for run in runs:
        for package, version in (run.get("versions") or {}).items():
            versions.setdefault(package, set()).add(version)
    made = _made(rows)
    packages = ", ".join(f"{package} {' and '.join(sorted(found))}" for package, found in versions.items())
    place = f"runs in {runs[0].place}" if runs[0].sweep and runs[0].experiment else ""
    parts = [part for part in (made[:1].upper() + made[1:], packages, place) if part]
    if parts:
        yield "; ".join(parts)
    said = []
    for column in shared:
        knowing = next((row for row in rows if row[column.key] is not None), None)
        said += [f"{column.title}: {column.text(knowing)}"] if knowing else []
    if said:
        yield f"All with {', '.join(said)}."
    yield from view.notes
    if any(row.get("paper") is not None for row in rows):
        yield f"The paper's figures are of {CARD}."
    elif view.has_paper and not runs[0].at_paper_size:
        yield "No figures of the paper: they belong to its sizes, experiment=paper/..."
