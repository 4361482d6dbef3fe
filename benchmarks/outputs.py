"""``python -m benchmarks.outputs [NAME ...]``: runs the documented commands and keeps what they print in docs/outputs.

The pages show these files; ``python -m benchmarks.pages`` puts them there. Speeds are worth reading only from a machine
that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "outputs"
_PROGRAM = ["-m", "lightning_mst"]
# A plain model, a norm that joins the MLP, a block that mixes tokens, layers that can't be checkpointed.
_FAMILIES = ("llama", "gemma2", "jamba", "ctrl")
_LLAMA3 = ["model=llama3_8b", "precision=bf16-true", "optimizer=adamw_in_backward"]

# The arguments of Python for each output.
COMMANDS = {
    "train": [*_PROGRAM, "train", "hydra.run.dir=outputs/train"],
    "compare": [*_PROGRAM, "compare", "--output", "outputs/compare"],
    "plan": [*_PROGRAM, "plan", *_LLAMA3],
    "plan_ladder": [
        *_PROGRAM, "plan", "--ladder", "--host-memory", "1TiB", *_LLAMA3, "--output", "outputs/plan_ladder"
    ],
    "plan_length": [
        *_PROGRAM, "plan", "--memory", "24GiB", "--length", "32768", "model=llama3_8b", "precision=nf4-lora",
        "--output", "outputs/plan_length",
    ],
    **{f"rewrite_{family}": ["-m", "benchmarks.rewrite_table", family] for family in _FAMILIES},
}  # fmt: skip
# What a command writes beside its output -> where the pages read or show it.
FILES = {
    "compare": {"compare/compare.json": "outputs/compare.json", "compare/compare.png": "compare.png"},
    "plan": {"plan/plan.json": "outputs/plan.json", "plan/plan.png": "plan.png"},
    "plan_ladder": {"plan_ladder/plan.json": "outputs/plan_ladder.json", "plan_ladder/plan.png": "plan_ladder.png"},
}


def run(name: str) -> None:
    """Runs a command and keeps what it prints to the standard output, without colours and trailing blanks."""
    environment = {**os.environ, "COLUMNS": "120", "PYTHONUTF8": "1", "NO_COLOR": "1", "TERM": "dumb"}
    result = subprocess.run(
        [sys.executable, *COMMANDS[name]], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    # Where the project lies is nobody's business; as many blanks keep a table's borders in place.
    here = f"{ROOT}/"
    output = re.sub(rf"{re.escape(here)}(\S*)", lambda path: path[1] + " " * len(here), result.stdout)
    lines = [line.rstrip() for line in output.splitlines()]
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.txt").write_text("\n".join(lines).strip("\n") + "\n", encoding="utf-8")
    for source, target in FILES.get(name, {}).items():
        shutil.copyfile(ROOT / "outputs" / source, ROOT / "docs" / target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*COMMANDS, []], help="which outputs (default: all)")
    for name in parser.parse_args().names or COMMANDS:
        print(name, flush=True)
        run(name)


if __name__ == "__main__":
    main()
