"""The README's tables, made from a result file: ``python -m benchmarks.tables``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
_BETWEEN = re.compile(r"(<!-- benchmark:ops -->\n).*?(<!-- /benchmark:ops -->)", re.DOTALL)


def markdown(result: dict[str, Any]) -> str:
    """Ratios to the unmodified block, time / peak bytes beyond the inputs, one table per block."""
    sizes = result["sizes"]
    lines = [
        f"Measured {result['date']} on {result['device']}, torch {result['torch']}, {result['dtype']}, "
        f"D = {sizes['hidden']}, I = {sizes['intermediate']}, V = {sizes['vocabulary']}, chunks by `auto`. "
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


def write_readme(result: dict[str, Any]) -> None:
    """Puts the tables between the README's markers."""
    text = README.read_text()
    if not _BETWEEN.search(text):
        raise ValueError(f"{README} has no <!-- benchmark:ops --> ... <!-- /benchmark:ops --> markers.")
    README.write_text(_BETWEEN.sub(lambda match: match[1] + markdown(result) + match[2], text))


if __name__ == "__main__":
    write_readme(json.loads((ROOT / "benchmarks" / "results" / "ops-cpu.json").read_text()))
