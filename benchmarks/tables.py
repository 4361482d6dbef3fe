"""The README's tables, made from the result files: ``python -m benchmarks.tables``.

``<!-- benchmark:head_cpu -->`` ... ``<!-- /benchmark:head_cpu -->`` holds those of
``benchmarks/results/head-cpu.json``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
_LETTERS = {"hidden": "D", "intermediate": "I", "vocabulary": "V", "layers": "layers"}
_BASE = "unmodified"
_NONE = "\N{EN DASH}"


def sections(readme: str) -> list[str]:
    """The names of the README's sections that are made from result files, in ``<!-- benchmark:name -->`` markers."""
    return re.findall(r"<!-- benchmark:(\w+) -->", readme)


def result_file(section: str) -> Path:
    """Where the measurements of a section are."""
    return RESULTS / f"{section.replace('_', '-')}.json"


def markdown(result: dict[str, Any]) -> str:
    """One table per block: ratios to the unmodified block in time and in peak bytes, passes, and the worst error."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if name != "lightning")
    sizes = ", ".join(f"{_LETTERS[name]} = {size}" for name, size in result["sizes"].items())
    lines = [
        f"Measured {result['date']} on {result['device']}, {versions}, {result['dtype']}, {sizes}, "
        "chunks by `auto`. Time of forward and backward (median of alternating runs) / peak bytes beyond the inputs, "
        "both as ratios to the unmodified block; matmuls in forward passes of the block, at the longest S; the largest "
        "relative error (Frobenius norm) of a gradient against fp64, at any S.",
    ]
    for block in dict.fromkeys(row["block"] for row in result["rows"]):
        lines += ["", *_table(block, [row for row in result["rows"] if row["block"] == block])]
        skipped = {entry["kind"]: entry["reason"] for entry in result["skipped"] if entry["block"] == block}
        if skipped:
            reasons = "; ".join(f"{kind} ({reason})" for kind, reason in skipped.items())
            lines += ["", f"Not run here: {reasons}."]
    return "\n".join(lines) + "\n"


def _table(block: str, rows: list[dict[str, Any]]) -> list[str]:
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    at = {(row["kind"], row["length"]): row for row in rows}
    lines = [
        f"| {block} | " + " | ".join(f"S = {length:,}" for length in lengths) + " | passes | error |",
        "|---|" + "---|" * (len(lengths) + 2),
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [at[kind, length] for length in lengths if (kind, length) in at]
        cells = [_cell(at.get((kind, length)), at[_BASE, length]) for length in lengths]
        passes = own[-1]["passes"]
        errors = [row["errors"][name] for row in own if row["errors"] for name in row["errors"] if name.startswith("d")]
        name = "unmodified, checkpointed" if "checkpointed" in block and kind == _BASE else kind
        ends = [_NONE if passes is None else f"{passes:.2f}", f"{max(errors):.1e}" if errors else _NONE]
        lines.append(f"| {name} | " + " | ".join([*cells, *ends]) + " |")
    return lines


def _cell(row: dict[str, Any] | None, base: dict[str, Any]) -> str:
    if row is None:
        return _NONE
    if row["seconds"] is None:
        return "out of memory"
    if row is base or base["seconds"] is None:
        return f"{row['seconds']:.2f} s / {row['peak_bytes'] / 2**20:,.0f} MiB"
    return f"{row['seconds'] / base['seconds']:.2f} / {row['peak_bytes'] / base['peak_bytes']:.2f}"


def write_readme(section: str, result: dict[str, Any]) -> None:
    """Puts the tables between the README's markers of a section."""
    text = README.read_text(encoding="utf-8")
    start, end = f"<!-- benchmark:{section} -->\n", f"<!-- /benchmark:{section} -->"
    between = re.compile(f"(?<={start}).*?(?={end})", re.DOTALL)
    if not between.search(text):
        raise ValueError(f"{README} has no {start.strip()} ... {end} markers.")
    README.write_text(between.sub(lambda _: markdown(result), text), encoding="utf-8")


def main() -> None:
    for section in sections(README.read_text(encoding="utf-8")):
        write_readme(section, json.loads(result_file(section).read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
