"""``python -m benchmarks.gpu_offload``: how much of the copies to the host and back hides behind the computation.

Forward and backward passes of a few layers, with and without their inputs on the host, take turns. What the copies take
alone is measured as well: as many bytes, to pinned memory and back. The hidden part is what of that does not show in
the step: 1 - (time with copies - time without) / time of the copies.

Writes ``benchmarks/results/gpu-offload.json`` with device, versions and date. Without a GPU nothing hides, as a CPU
copies by itself; for a try: ``--lengths 1024 --hidden 64 --intermediate 128 --vocabulary 256 --layers 2``.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.sizes import Sizes, default_lengths, default_sizes
from benchmarks.steps import build_llama, step_of, with_setting
from lightning_mst.program.environment import environment
from lightning_mst.units import GIB

RESULTS = Path(__file__).parent / "results" / "gpu-offload.json"
WITH_COPIES = {"layer_offload": "layer", "layer_offload_attention": "layer"}
"""Settings of conf/mst with copies, and what is the same without."""


def main() -> None:
    arguments = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Sizes)}
    sizes = dataclasses.replace(
        default_sizes("layers", device), **{name: size for name, size in asked.items() if size is not None}
    )
    lengths = arguments.lengths or default_lengths("layers", device)
    rows = [row for length in lengths for row in measured(sizes, length, device, arguments.runs)]
    report = {**environment(), "sizes": dataclasses.asdict(sizes), "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {RESULTS}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_offload", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens (default: by device)")
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name}", type=int, help="default: by device")
    parser.add_argument("--runs", type=int, default=3, help="timed repetitions; the median counts")
    return parser.parse_args()


def measured(sizes: Sizes, length: int, device: torch.device, runs: int) -> list[dict[str, Any]]:
    """A row for each setting with copies."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = build_llama(sizes, length, dtype)
    ids = torch.randint(sizes.vocabulary, (1, length), device=device)
    names = dict.fromkeys([*WITH_COPIES.values(), *WITH_COPIES])
    steps = {name: step_of(with_setting(model, name), ids) for name in names}
    leaves = list(model.parameters())
    measure.seconds(steps, leaves, budget=0, runs=1)  # warms up
    times = measure.seconds(steps, leaves, budget=float("inf"), runs=runs)
    medians = {name: statistics.median(own) for name, own in times.items()}
    measure.forget_gradients(leaves)
    del steps
    gc.collect()
    hidden_state = torch.empty(length, sizes.hidden, dtype=dtype, device=device)
    rows = []
    for name, without in WITH_COPIES.items():
        # The last layer's input is still there when its backward pass begins, but is copied as well.
        copies = sizes.layers * (1 if name == "layer_offload" else 2)
        to_host, back = copy_seconds(hidden_state)
        alone = copies * (to_host + back)
        shown = medians[name] - medians[without]
        rows.append(
            {
                "length": length,
                "mst": name,
                "seconds": medians[name],
                "seconds_without": medians[without],
                "copied_gib": 2 * copies * hidden_state.nbytes / GIB,
                "copy_seconds": alone,
                "hidden": max(0.0, 1 - max(0.0, shown) / alone),
            }
        )
        print(f"S={length:7,} {name:24} {medians[name]:.2f} s, {medians[without]:.2f} s without; copies alone "
              f"{alone:.2f} s, {rows[-1]['hidden']:.0%} of them hidden")  # fmt: skip
    return rows


def copy_seconds(tensor: torch.Tensor) -> tuple[float, float]:
    """What a copy to pinned memory takes, and one back."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    taken = []
    for target, source in ((host, tensor), (tensor, host)):
        target.copy_(source)
        measure.wait()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        measure.wait()
        taken.append(time.perf_counter() - start)
    return taken[0], taken[1]


if __name__ == "__main__":
    main()
