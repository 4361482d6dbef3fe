"""``python -m benchmarks.gpu_memory``: the planner against a GPU.

1. A few layers of a model at several lengths: predicted against ``torch.cuda.max_memory_allocated()``.
2. With ``--longest``: the longest sequence of the whole model for which a real step fits a part of the device's memory.

Writes ``benchmarks/results/gpu-memory.json`` with device, versions and date. Without a GPU the first part runs on the
CPU, where the bytes of tensors are counted. For a small model: ``--model llama_small --layers 2 --lengths 1024``.
"""

from __future__ import annotations

import argparse
import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from lightning_mst.memory.longest import longest
from lightning_mst.memory.setting import Setting
from lightning_mst.program.plan_config import Run, compose_runs, mst_config, read_run
from lightning_mst.program.plan_measure import run_steps
from lightning_mst.rewrite.config import MSTConfig
from lightning_mst.units import GIB, parse_bytes

RESULTS = Path(__file__).parent / "results" / "gpu-memory.json"


def main() -> None:
    arguments = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.longest and device.type == "cpu":
        raise SystemExit("--longest needs a GPU; without one, `lightning-mst plan` predicts it.")
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": arguments.model,
        "precision": arguments.precision,
        "optimizer": arguments.optimizer,
        "steps": [
            row(arguments, rung, layers, length, device)
            for layers in arguments.layers
            for length in arguments.lengths
            for rung in arguments.mst
        ],
    }
    if arguments.longest:
        report["memory_gib"] = parse_bytes(arguments.memory) / GIB
        report["longest"] = [longest_row(arguments, rung, device) for rung in arguments.mst]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {RESULTS}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_memory", description="The planner against a GPU.")
    parser.add_argument("--model", default="llama3_8b", help="a file of conf/model")
    parser.add_argument("--precision", default="bf16-true")
    parser.add_argument("--optimizer", default="adamw_in_backward", help="a file of conf/optimizer")
    parser.add_argument("--mst", nargs="+", default=["off", "recompute", "paper", "auto"])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 65536, 131072])
    parser.add_argument("--longest", action="store_true", help="and the longest sequence of the whole model")
    parser.add_argument("--memory", default="80GiB", help="what --longest may take of the device")
    return parser.parse_args()


def run_of(arguments: argparse.Namespace, rung: str, layers: int | None) -> tuple[Run, MSTConfig]:
    chosen = [f"model={arguments.model}", f"precision={arguments.precision}", f"optimizer={arguments.optimizer}"]
    config = compose_runs([rung], chosen)[rung]
    return read_run(config, layers=layers), mst_config(config)


def row(arguments: argparse.Namespace, rung: str, layers: int, length: int, device: torch.device) -> dict[str, Any]:
    """Predicted and measured peak of one setting; measured is ``None`` where the step ran out of memory."""
    predicted, measured = predict_and_run(arguments, rung, layers, length, device)
    print(f"{rung:10} {layers:2} layers {length:7,} tokens: predicted {predicted / GIB:.2f} GiB, ", end="")
    print("out of memory" if measured is None else f"measured {measured / GIB:.2f} ({predicted / measured:.3f})")
    sizes = {"predicted_gib": predicted / GIB, "measured_gib": measured and measured / GIB}
    return {"mst": rung, "layers": layers, "length": length, **sizes}


def predict_and_run(
    arguments: argparse.Namespace, rung: str, layers: int | None, length: int, device: torch.device
) -> tuple[int, int | None]:
    run, config = run_of(arguments, rung, layers)
    training = replace(run.training, device=device.type)
    setting = Setting(run.build_model, training)
    predicted = setting.predict(config, length).tensors
    try:
        measured = run_steps(run.build_model, training, setting.step(length), config, device).tensors
    except torch.OutOfMemoryError:
        measured = None
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return predicted, measured


def longest_row(arguments: argparse.Namespace, rung: str, device: torch.device) -> dict[str, Any]:
    """The longest sequence that fits: predicted for tensors alone, and found by real steps."""
    budget = parse_bytes(arguments.memory)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
    run, config = run_of(arguments, rung, None)
    setting = Setting(run.build_model, run.training)
    predicted = longest(lambda length: setting.predict(config, length).tensors, budget)

    def measured(length: int) -> int:
        _, peak = predict_and_run(arguments, rung, None, length, device)
        return 2 * budget if peak is None else peak

    found = longest(measured, budget, expected=predicted)
    print(f"{rung:10} longest in {arguments.memory}: predicted {predicted:,}, found {found:,}")
    return {"mst": rung, "predicted": predicted, "found": found}


if __name__ == "__main__":
    main()
