"""The comparison with the paper as a page of the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.paper.rows import LENGTH_BOUND, RATIO_BOUND, Row
from lightning_mst.report.paper import K

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "paper_memory.md"
RESULTS = ROOT / "benchmarks" / "results" / "paper-memory.json"
TEMPLATE = Path(__file__).parent / "page.md"


def page(results: dict[str, Any]) -> str:
    """The whole page.

    Args:
        results: versions, and rows by section, as ``RESULTS`` holds them.
    """
    rows = {name: [Row(**row) for row in section] for name, section in results["sections"].items()}
    replayed = [*rows["lengths"], *rows["variants"]]
    return TEMPLATE.read_text().format(
        torch=results["torch"],
        transformers=results["transformers"],
        device=f"{results['device_bytes'] / 2**30:.2f}",
        overhead=f"{results['overhead_bytes'] / 2**20:.0f}",
        length_bound=f"{LENGTH_BOUND:.0%}",
        ratio_bound=f"{RATIO_BOUND:.0%}",
        mst_deviation=next(f"{row.deviation:.1%}" for row in rows["lengths"] if row.name == "Llama3-8B, mst"),
        fragments=f"{max(1 - row.predicted / (row.tensors or row.predicted) for row in replayed):.0%}",
        thousands=", ".join(f"{row.predicted / (row.paper / K * 1000) - 1:+.1%}" for row in rows["lengths"]),
        **{name: _table(section) for name, section in rows.items()},
    )


def _table(rows: list[Row]) -> str:
    """A table; columns that would be empty are left out."""
    number = ",.0f" if rows[0].paper >= 1000 else ".2f" if not rows[0].ours else ".1f"
    columns = {
        "": [row.name for row in rows],
        "paper": [f"{row.paper:{number}}" for row in rows],
        "the paper's code, modelled": [f"{row.predicted:{number}}" for row in rows],
        "deviation": [f"{row.deviation:+.1%}" for row in rows],
        "by tensors alone": [f"{row.tensors:{number}}" if row.tensors else "" for row in rows],
        "lightning_mst": [row.ours for row in rows],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
