"""``lightning-mst report``: gathers runs into one CSV file, one page of tables and one picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_mst.program.sweep import write_csv
from lightning_mst.report.read import find_runs
from lightning_mst.report.sections import sections_of
from lightning_mst.report.tables import all_rows, show, to_markdown
from lightning_mst.report.view import Section

__all__ = ["main"]

CSV, PAGE, PICTURE = "report.csv", "report.md", "report.png"


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments after ``report``.

    Raises:
        SystemExit: 1 if there is no run, 2 if the command line is wrong.
    """
    folders, output, title = parse(argv)
    runs = find_runs(folders)
    if not runs:
        places = ", ".join(str(folder) for folder in folders)
        print(
            f"lightning-mst report: no run (result.json) in or below {places}. Runs of lightning-mst train leave one,"
            " by default below outputs/, and sweeps (-m) below multirun/",
            file=sys.stderr,
        )
        raise SystemExit(1)
    sections = sections_of(runs)
    for section in sections:
        show(section)
    output.mkdir(parents=True, exist_ok=True)
    drawn = draw(title, [section for section in sections if section.runs], output / PICTURE)
    write_csv(output / CSV, all_rows(sections))
    page = to_markdown(title, sections, picture=PICTURE if drawn else None)
    (output / PAGE).write_text(page, encoding="utf-8")
    print(f"{len(runs)} runs. Written to {output}: {', '.join([CSV, PAGE, *([PICTURE] if drawn else [])])}")


def parse(argv: Sequence[str]) -> tuple[list[Path], Path, str]:
    """Folders to search, output folder and title of a command line."""
    parser = argparse.ArgumentParser(
        prog="lightning-mst report",
        description="Gather all runs of lightning-mst train below some folders (single runs, sweeps, experiments) into"
        f" {CSV}, {PAGE} and {PICTURE}, with the paper's figures beside ours where there are any.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="where to look for runs")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the files go (default: the first DIR)")
    parser.add_argument("--title", default="Experiments with mini-sequences", help="of the page and the picture")
    arguments = parser.parse_args(argv)
    for folder in arguments.folders:
        if not folder.is_dir():
            parser.error(f"DIR should be a folder with runs, got {str(folder)!r}, which is none")
    return arguments.folders, arguments.output or arguments.folders[0], arguments.title


def draw(title: str, sections: Sequence[Section], path: Path) -> bool:
    """Draw the sections, and say whether that could be done."""
    path.unlink(missing_ok=True)  # an old picture does not stand for new runs
    if not sections:
        return False
    try:
        from lightning_mst.report.picture import draw_report
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        print("No picture without matplotlib: pip install 'lightning-mst[plots]'")
        return False
    draw_report(title, sections).savefig(path)
    return True
