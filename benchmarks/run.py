"""``python -m benchmarks.run [head] [mlp] [losses] [step] [layers]``: our blocks beside public ones, in the same run.

Each section goes to a file ``<section>-<cpu or device>.json``, by default in ``benchmarks/results``;
``python -m benchmarks.tables`` makes the README's tables from them. All of it takes less than 25 minutes on two quiet
CPU cores. ``--hidden 64 --intermediate 128 --vocabulary 256 --lengths 128`` takes seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import re
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import heads, layers, losses, mlps, steps
from benchmarks.contest import Contest, hold
from benchmarks.sizes import Sizes, default_lengths, default_sizes
from benchmarks.tables import RESULTS, markdown
from lightning_mst.program.environment import environment

SECTIONS: dict[str, Callable[[Sizes, int, torch.dtype, torch.device], list[Contest]]] = {
    "head": heads.contest,
    "mlp": mlps.contest,
    "losses": losses.contest,
    "step": steps.contest,
    "layers": layers.contest,
}
PEERS = ("liger-kernel", "cut-cross-entropy", "deepspeed", "triton")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    device = torch.device(arguments.device)
    for section in arguments.sections or SECTIONS:
        torch.manual_seed(0)
        result = measure(section, device, arguments)
        arguments.output.mkdir(parents=True, exist_ok=True)
        file = arguments.output / f"{section}-{slug(device)}.json"
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"\n{markdown(result)}\nwritten to {file}\n", flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="what to measure (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="such as bfloat16 (default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens (default: by section and device)")
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help="default: by section and device")
    parser.add_argument("--runs", type=int, default=5, help="the most timed repetitions; the median counts")
    parser.add_argument(
        "--seconds", type=float, default=40, help="of each block and length, after which no further repetition begins"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files")
    return parser.parse_args(argv)


def measure(section: str, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """One section, at all lengths."""
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    names = [field.name for field in dataclasses.fields(Sizes)]
    asked = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    sizes = dataclasses.replace(default_sizes(section, device), **asked)
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for length in arguments.lengths or default_lengths(section, device):
        contests = SECTIONS[section](sizes, length, dtype, device)
        while contests:
            done, left_out = hold(contests.pop(0), budget=arguments.seconds, runs=arguments.runs)
            rows += done
            skipped += [entry for entry in left_out if entry not in skipped]
        gc.collect()
    return {
        **described(device),
        "dtype": str(dtype).removeprefix("torch."),
        "sizes": {name: value for name, value in dataclasses.asdict(sizes).items() if name in USED[section]},
        "rows": rows,
        "skipped": skipped,
    }


USED = {
    "head": ("hidden", "vocabulary"),
    "mlp": ("hidden", "intermediate"),
    "losses": ("hidden", "vocabulary"),
    "step": ("hidden", "intermediate", "vocabulary", "layers"),
    "layers": ("hidden", "intermediate", "vocabulary", "layers"),
}


def described(device: torch.device) -> dict[str, Any]:
    """Device, versions and date; with the versions of the peers that are installed."""
    here = environment()
    if device.type == "cpu" and torch.cuda.is_available():
        here["device"] = f"CPU, {torch.get_num_threads()} threads"
    for package in PEERS:
        try:
            here["versions"][package] = version(package)
        except PackageNotFoundError:  # named under "skipped"
            continue
    return here


def slug(device: torch.device) -> str:
    """``cpu``, or the GPU's name as a part of a file's name."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


if __name__ == "__main__":
    main()
