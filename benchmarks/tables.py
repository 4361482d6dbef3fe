"""The README's tables, made from the result files: ``python -m benchmarks.tables``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
_LETTERS = {"hidden": "D", "intermediate": "I", "vocabulary": "V"}


def sections(readme: str) -> list[str]:
    """The names of the README's sections that are made from result files, in ``<!-- benchmark:name -->`` markers."""
    return re.findall(r"<!-- benchmark:(\w+) -->", readme)


def result_file(section: str) -> Path:
    """Where the measurements of a section are."""
    return ROOT / "benchmarks" / "results" / f"{section}-cpu.json"


def markdown(result: dict[str, Any]) -> str:
    """Ratios to the unmodified block, time / peak bytes beyond the inputs, one table per block."""
    sizes = ", ".join(f"{_LETTERS[name]} = {size}" for name, size in result["sizes"].items())
    lines = [
        f"Measured {result['date']} on {result['device']}, torch {result['torch']}, {result['dtype']}, "
        f"{sizes}, chunks by `auto`. "
        "Time of forward and backward / peak bytes beyond the inputs, both as ratios to the unmodified block.",
    ]
    for block in dict.fromkeys(row["block"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["block"] == block]
        lengths = list(dict.fromkeys(row["length"] for row in rows))
        lines += ["", "| " + block + " | " + " | ".join(f"S = {n:,}" for n in lengths) + " |"]
        lines += ["|---|" + "---|" * len(lengths)]
        for kind in dict.fromkeys(row["kind"] for row in rows):
            cells = []
            for length in lengths:
                at = {row["kind"]: row for row in rows if row["length"] == length}
                base, row = at["unmodified"], at[kind]
                if kind == "unmodified":
                    cells.append(f"{row['seconds']:.2f} s / {row['peak_bytes'] / 2**20:,.0f} MiB")
                else:
                    time, space = row["seconds"] / base["seconds"], row["peak_bytes"] / base["peak_bytes"]
                    cells.append(f"{time:.2f} / {space:.2f}")
            name = "unmodified, checkpointed" if "checkpointed" in block and kind == "unmodified" else kind
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_readme(section: str, result: dict[str, Any]) -> None:
    """Puts the tables between the README's markers of a section."""
    text = README.read_text()
    start, end = f"<!-- benchmark:{section} -->\n", f"<!-- /benchmark:{section} -->"
    between = re.compile(f"(?<={start}).*?(?={end})", re.DOTALL)
    if not between.search(text):
        raise ValueError(f"{README} has no {start.strip()} ... {end} markers.")
    README.write_text(between.sub(lambda _: markdown(result), text))


if __name__ == "__main__":
    for name in sections(README.read_text()):
        write_readme(name, json.loads(result_file(name).read_text()))
