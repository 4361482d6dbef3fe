"""``python -m benchmarks.run``: time and bytes of the two ops beside the unmodified blocks and public ways to chunk.

Writes ``benchmarks/results/ops-cpu.json`` and puts the tables into the README.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from pathlib import Path

import torch

from benchmarks import blocks, measure
from benchmarks.tables import write_readme

RESULTS = Path(__file__).parent / "results" / "ops-cpu.json"
HIDDEN, INTERMEDIATE, VOCAB = 1024, 3584, 32000


def contest(name: str, steps: dict[str, measure.Step], inputs: list[torch.Tensor], length: int, runs: int) -> list:
    # Measuring the bytes first warms up for measuring the time.
    peaks = {kind: measure.peak_bytes(step, inputs) for kind, step in steps.items()}
    times = measure.seconds(steps, runs if length <= 4096 else 1)
    rows = [
        {"block": name, "length": length, "kind": kind, "seconds": times[kind], "peak_bytes": peaks[kind]}
        for kind in steps
    ]
    for row in rows:
        print(f"{name:24} S={length:6} {row['kind']:22} {row['seconds']:8.2f} s {row['peak_bytes'] / 2**20:9.0f} MiB")
    return rows


def head_rows(length: int, runs: int) -> list[dict]:
    hidden = torch.randn(length, HIDDEN, requires_grad=True)
    weight = (torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5).requires_grad_()
    labels = torch.randint(0, VOCAB, (length,))
    return contest("LM head", blocks.lm_heads(hidden, weight, labels), [hidden, weight, labels], length, runs)


def mlp_rows(length: int, runs: int) -> list[dict]:
    mlp = blocks.GatedMLP(HIDDEN, INTERMEDIATE)
    x = torch.randn(1, length, HIDDEN, requires_grad=True)
    rows: list[dict] = []
    for name, in_layer in (("MLP", False), ("MLP, checkpointed layer", True)):
        rows += contest(name, blocks.mlps(x, mlp, in_layer=in_layer), [x, *mlp.parameters()], length, runs)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument(
        "--runs", type=int, default=3, help="timed repetitions up to S = 4096 (beyond: 1); the median counts"
    )
    parser.add_argument("--only", choices=["head", "mlp"], help="measure one block, and keep the file's other rows")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict] = []
    for length in arguments.lengths:
        if arguments.only != "mlp":
            rows += head_rows(length, arguments.runs)
        if arguments.only != "head":
            rows += mlp_rows(length, arguments.runs)
    if arguments.only:
        kept = json.loads(RESULTS.read_text())["rows"]
        rows += [row for row in kept if (row["block"] == "LM head") == (arguments.only == "mlp")]
    rows.sort(key=lambda row: row["block"])
    result = {
        "date": datetime.date.today().isoformat(),
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        "dtype": "float32",
        "sizes": {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "vocabulary": VOCAB},
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    write_readme(result)


if __name__ == "__main__":
    main()
