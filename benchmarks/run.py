"""``python -m benchmarks.run [head] [mlp] [losses]``: time and bytes beside unmodified blocks and public ways to chunk.

The two ops, and losses that run on deferred logits. Writes ``ops-cpu.json`` and ``losses-cpu.json`` to
``benchmarks/results`` and puts the tables into the README.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform

import torch

from benchmarks import blocks, measure
from benchmarks.tables import result_file, write_readme

HIDDEN, INTERMEDIATE, VOCAB = 1024, 3584, 32000
SIZES = {
    "ops": {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "vocabulary": VOCAB},
    "losses": {"hidden": HIDDEN, "vocabulary": VOCAB},
}
LONGEST_DISTILLATION = 8192  # beyond, the unmodified form takes more than 8 GB


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


def loss_rows(length: int, runs: int) -> list[dict]:
    hidden = torch.randn(length, HIDDEN, requires_grad=True)
    weight = (torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5).requires_grad_()
    teacher = torch.randn(length, HIDDEN), torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5
    labels = torch.randint(0, VOCAB, (length,))
    steps = blocks.losses(blocks.log_probabilities, [(hidden, weight)], labels)
    rows = contest("Per-token log-probabilities", steps, [hidden, weight, labels], length, runs)
    if length <= LONGEST_DISTILLATION:
        steps = blocks.losses(blocks.distillation, [(hidden, weight), teacher])
        rows += contest("Distillation", steps, [hidden, weight, *teacher], length, runs)
    return rows


# What can be measured, and the result file and README section that it goes to.
MEASUREMENTS = {"head": ("ops", head_rows), "mlp": ("ops", mlp_rows), "losses": ("losses", loss_rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "only", nargs="*", choices=MEASUREMENTS, help="what to measure; the files keep their other rows (default: all)"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument(
        "--runs", type=int, default=3, help="timed repetitions up to S = 4096 (beyond: 1); the median counts"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: dict[str, list[dict]] = {}
    for length in arguments.lengths:
        for section, measured in (MEASUREMENTS[name] for name in arguments.only or MEASUREMENTS):
            rows.setdefault(section, []).extend(measured(length, arguments.runs))
    for section in rows:
        save(section, rows[section])


def save(section: str, rows: list[dict]) -> None:
    path = result_file(section)
    blocks_measured = {row["block"] for row in rows}
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = rows + [row for row in kept if row["block"] not in blocks_measured]
    result = {
        "date": datetime.date.today().isoformat(),
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        "dtype": "float32",
        "sizes": SIZES[section],
        "rows": sorted(rows, key=lambda row: row["block"]),
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    write_readme(section, result)


if __name__ == "__main__":
    main()
