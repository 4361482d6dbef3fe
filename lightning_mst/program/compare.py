"""``lightning-mst compare``: the same training steps under several mini-sequence settings, side by side."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_mst.program.results import read_result, remove_result
from lightning_mst.program.settings import add_settings, read_settings
from lightning_mst.program.sweep import write_csv
from lightning_mst.program.tables import describe_model, number, print_table

__all__ = ["compare", "main"]

DEFAULT_STEPS = 4
DEFAULT_OVERRIDES = ("data.sequence_length=8192",)
# What a comparison does without: it measures training steps, and many runs should leave little behind.
QUICK = ("validate=false", "trainer.limit_val_batches=0", "logger=none")
STDERR_LINES = 30


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments after ``compare``.

    Raises:
        SystemExit: 1 if a run failed, 2 if the command line is wrong.
    """
    settings, steps, output, overrides = parse(argv)
    try:
        results = {setting: run(setting, steps, output, overrides) for setting in settings}
    except RunFailed as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from error
    report = compare(results)
    output.mkdir(parents=True, exist_ok=True)
    (output / "compare.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_csv(output / "compare.csv", report["settings"])
    show(report)
    print(f"Written to {output}: compare.json, compare.csv", end="")
    try:
        from lightning_mst.program.plot import plot_comparison
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        print("\nNo chart without matplotlib: pip install 'lightning-mst[plots]'")
    else:
        plot_comparison(report, output / "compare.png")
        print(", compare.png")


def parse(argv: Sequence[str]) -> tuple[list[str], int, Path, list[str]]:
    """Settings, steps, output folder and Hydra overrides of a command line."""
    parser = argparse.ArgumentParser(
        prog="lightning-mst compare",
        description="Run the same training steps (same weights, same data) under several mini-sequence settings, each "
        "in a process of its own, and compare memory, speed and loss.",
    )
    add_settings(
        parser,
        ("off", "auto"),
        "settings to compare, the first is the reference",
        f"Hydra overrides of every run, as for train (default: {' '.join(DEFAULT_OVERRIDES)})",
    )
    parser.add_argument(
        "--steps", type=int, default=DEFAULT_STEPS, help=f"training steps of each (default: {DEFAULT_STEPS})"
    )
    parser.add_argument(
        "--output", type=Path, help="folder for the table, the chart and the runs (default: outputs/DATE/TIME-compare)"
    )
    arguments = parser.parse_intermixed_args(argv)
    settings, overrides = read_settings(parser, arguments.mst, arguments.overrides)
    if arguments.steps < 1:
        parser.error(f"--steps should be 1 or more, got {arguments.steps}")
    output = arguments.output or Path("outputs", datetime.now().strftime("%Y-%m-%d/%H-%M-%S-compare"))
    return settings, arguments.steps, output, overrides


class RunFailed(Exception):
    """A run of the comparison ended with an error."""


def run(setting: str, steps: int, output: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Train under one setting in a process of its own, and return its result.

    A process of its own, because a process never returns to the memory that it had when it was new.

    Raises:
        RunFailed: With the end of what the process wrote to stderr.
    """
    folder = (output / setting).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    remove_result(folder)
    quoted = str(folder).replace("'", "\\'")
    command = [sys.executable, "-m", "lightning_mst", "train", *DEFAULT_OVERRIDES, *QUICK, *overrides]
    command += [f"mst={setting}", f"trainer.max_steps={steps}", f"hydra.run.dir='{quoted}'"]
    progress = Console(stderr=True)
    if not progress.is_terminal:  # where no spinner turns
        progress.print(f"mst={setting}: {steps} training steps")
    with (
        progress.status(f"mst={setting}: {steps} training steps"),
        (folder / "stdout.log").open("w", encoding="utf-8") as stdout,
        (folder / "stderr.log").open("w", encoding="utf-8") as stderr,
    ):
        code = subprocess.run(command, stdout=stdout, stderr=stderr, check=False).returncode
    result = read_result(folder)
    if code != 0 or result is None:
        lines = (folder / "stderr.log").read_text(encoding="utf-8", errors="replace").splitlines()
        tail = "\n".join(lines[-STDERR_LINES:])
        signal = " (killed; out of memory?)" if code in (-9, 137) else ""
        raise RunFailed(
            f"{tail}\nlightning-mst compare: the run mst={setting} ended with code {code}{signal}; see {folder}"
        )
    return result


def compare(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Set results side by side.

    Args:
        results: Setting -> what :func:`lightning_mst.program.train.train` returned; the first is the reference.

    Returns:
        What the runs share (``model``, ``parameters``, ``trainable_parameters``, ``precision``, ``quantization``,
        ``adapter``, ``sequence_length``, ``batch_size``, ``steps``, ``strategy``, ``devices``) and ``settings``: a
        list of ``mst``, ``peak_memory_gib``, ``peak_memory_ratio``, ``tokens_per_second``,
        ``tokens_per_second_ratio``, ``loss`` (of the last step) and ``loss_difference`` (the largest of all steps,
        absolute). Ratios are to the reference; what was not measured is None.
    """
    reference = next(iter(results.values()))
    shared = (
        "model", "parameters", "trainable_parameters", "precision", "quantization", "adapter", "sequence_length",
        "batch_size", "steps", "strategy", "devices",
    )  # fmt: skip
    rows = []
    for setting, result in results.items():
        pairs = list(zip(result["losses"], reference["losses"], strict=True))
        finite = all(value is not None for pair in pairs for value in pair)  # nan is written as null
        rows.append(
            {
                "mst": setting,
                "peak_memory_gib": result["peak_memory_gib"],
                "peak_memory_ratio": _ratio(result, reference, "peak_memory_gib"),
                "tokens_per_second": result["tokens_per_second"],
                "tokens_per_second_ratio": _ratio(result, reference, "tokens_per_second"),
                "loss": result["loss"],
                "loss_difference": max(abs(a - b) for a, b in pairs) if pairs and finite else None,
            }
        )
    return {**{key: reference.get(key) for key in shared}, "settings": rows}


def _ratio(result: dict[str, Any], reference: dict[str, Any], key: str) -> float | None:
    return result[key] / reference[key] if result[key] and reference[key] else None


def show(report: dict[str, Any]) -> None:
    """Print a comparison as a table."""

    def with_ratio(row: dict[str, Any], key: str, digits: int) -> str:
        value, ratio = row[key], row[f"{key.removesuffix('_gib')}_ratio"]
        is_reference = row is report["settings"][0]
        return number(value, digits) if ratio is None or is_reference else f"{number(value, digits)} ({ratio:.2f}x)"

    print_table(
        headline(report),
        ["mst", "peak memory (GiB)", "tokens per second", "last loss", "largest loss difference"],
        [
            [
                row["mst"],
                with_ratio(row, "peak_memory_gib", 2),
                with_ratio(row, "tokens_per_second", 0),
                number(row["loss"], 5),
                "-" if row["loss_difference"] is None else f"{row['loss_difference']:.1e}",
            ]
            for row in report["settings"]
        ],
    )


def headline(report: dict[str, Any]) -> str:
    """What the runs of a comparison share, in one line."""
    tokens = f"{report['batch_size']} x {report['sequence_length']:,} tokens"
    several = report["devices"] is not None and report["devices"] > 1
    devices = f" on each of {report['devices']} devices ({report['strategy']})" if several else ""
    return f"{describe_model(report)}: {report['steps']} steps of {tokens}{devices}"
