"""``python -m benchmarks.gpu_longest``: the longest sequence of which a whole model survives a step, in 80 GiB.

Steps of ever longer sequences, up to the one that the planner calls the longest: forward pass, backward pass,
optimizer. Each is timed and its peak compared with the prediction; the run ends when memory runs out, or before the
step that would end after ``--seconds`` (attention takes time quadratic in the length).

Writes ``benchmarks/results/gpu-longest.json`` with device, versions and date. Without a GPU the peak is that of the
process, which is no match for the prediction: ``--model llama_small --precision 32-true --memory 256MiB`` is for a try.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import wait
from lightning_mst.experiments.fitting import limited_to
from lightning_mst.memory.longest import longest
from lightning_mst.memory.peak import PeakMemory
from lightning_mst.memory.prediction import vocab_size_of
from lightning_mst.memory.rehearsal import Step
from lightning_mst.memory.setting import Setting
from lightning_mst.ops.free_host_memory import free_host_memory
from lightning_mst.program.environment import environment
from lightning_mst.program.plan_config import compose_runs, mst_config, read_run
from lightning_mst.program.plan_measure import real_model, take_step
from lightning_mst.rewrite.handle import apply_mst
from lightning_mst.units import GIB, parse_bytes

RESULTS = Path(__file__).parent / "results" / "gpu-longest.json"
_FIRST = 256
"""Tokens of a step that only sets up what later ones find."""
SHARES = (8, 4, 2, 1.5, 1.25, 1.1, 1)
"""What the predicted length is divided by, step after step."""


def main() -> None:
    arguments = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [f"model={arguments.model}", f"precision={arguments.precision}", f"optimizer={arguments.optimizer}"]
    composed = compose_runs([arguments.mst], chosen)[arguments.mst]
    run, config = read_run(composed), mst_config(composed)
    training = replace(run.training, device=device.type)
    setting = Setting(run.build_model, training)
    budget, host = parse_bytes(arguments.memory), free_host_memory()

    def needed(length: int) -> int:
        prediction = setting.predict(config, length)
        return max(prediction.total, prediction.host * budget // host)

    predicted = longest(needed, budget)
    print(f"predicted: {predicted:,} tokens in {arguments.memory} of the device and {host / GIB:.0f} GiB of the host")
    rows: list[dict[str, Any]] = []
    memory = PeakMemory(device)
    with limited_to(budget, device):
        model = real_model(run.build_model, training, device)
        apply_mst(model, config)
        optimizer = training.make_optimizer(model)
        take(model, optimizer, setting.step(_FIRST), device)  # leaves the optimizer's states
        for length in lengths(predicted, rows, arguments.seconds):
            prediction = setting.predict(config, length)
            memory.reset()
            start = time.monotonic()
            try:
                take(model, optimizer, setting.step(length), device)
            except torch.OutOfMemoryError:
                print(f"{length:9,} tokens: out of memory")
                rows.append({"length": length, "seconds": None, "peak_gib": None})
                break
            seconds, peak = time.monotonic() - start, memory.read() or 0
            sizes = {"peak_gib": peak / GIB, "predicted_gib": prediction.tensors / GIB}
            rows.append({"length": length, "seconds": seconds, **sizes, "host_gib": prediction.host / GIB})
            print(f"{length:9,} tokens: {seconds:.0f} s, {peak / GIB:.2f} GiB ({memory.description}), "
                  f"predicted {prediction.tensors / GIB:.2f}", flush=True)  # fmt: skip
    settings = {name: getattr(arguments, name) for name in ("model", "precision", "optimizer", "mst", "memory")}
    report = {**environment(), **settings, "predicted_length": predicted, "steps": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {RESULTS}")


def take(model: nn.Module, optimizer: Any, step: Step, device: torch.device) -> None:
    """One step with random tokens."""
    tokens = torch.randint(vocab_size_of(model) or 2, step.batch["input_ids"].shape, device=device)
    take_step(model, optimizer, {"input_ids": tokens, "labels": tokens}, step, accumulates=False)
    wait()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_longest", description=__doc__)
    parser.add_argument("--model", default="llama3_8b", help="a file of conf/model")
    parser.add_argument("--precision", default="bf16-true")
    parser.add_argument("--optimizer", default="adamw_in_backward", help="a file of conf/optimizer")
    parser.add_argument("--mst", default="layer_offload", help="a file of conf/mst")
    parser.add_argument("--memory", default="80GiB", help="of the device; no more is used")
    parser.add_argument("--seconds", type=float, default=540, help="of the whole run")
    return parser.parse_args()


def lengths(predicted: int, rows: list[dict[str, Any]], seconds: float) -> Iterator[int]:
    """The lengths to try, as long as there is time: the last step's, times the square of the ratio of lengths."""
    begin = time.monotonic()
    for share in SHARES:
        length = int(predicted / share)
        left = seconds - (time.monotonic() - begin)
        if rows and rows[-1]["seconds"] * (length / rows[-1]["length"]) ** 2 > left:
            print(f"{length:9,} tokens would take longer than is left")
            return
        yield length


if __name__ == "__main__":
    main()
