"""``python -m benchmarks.gpu_memory``: the planner against a GPU.

A few layers of a model at several lengths: predicted against ``torch.cuda.max_memory_allocated()``. (The longest
sequence of whole models is an experiment: ``lightning-mst train -m experiment=paper/max_length``.)

Writes to ``benchmarks/results`` with device, versions and date. Without a GPU it runs on the CPU, where
the bytes of tensors are counted. For a small model: ``--model llama_small --layers 2 --lengths 1024``.
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

from lightning_mst.memory.setting import Setting
from lightning_mst.program.plan_config import compose_runs, mst_config, read_run
from lightning_mst.program.plan_measure import run_steps
from lightning_mst.units import GIB

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    arguments = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / arguments.output
    file.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {file}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_memory", description="The planner against a GPU.")
    parser.add_argument("--model", default="llama3_8b", help="a file of conf/model")
    parser.add_argument("--precision", default="bf16-true")
    parser.add_argument("--optimizer", default="adamw_in_backward", help="a file of conf/optimizer")
    parser.add_argument("--mst", nargs="+", default=["off", "recompute", "paper", "auto"])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 65536, 131072])
    parser.add_argument("--output", default="gpu-memory.json", help="a file in benchmarks/results")
    return parser.parse_args()


def row(arguments: argparse.Namespace, rung: str, layers: int, length: int, device: torch.device) -> dict[str, Any]:
    """Predicted and measured peak of one setting; measured is ``None`` where the step ran out of memory."""
    chosen = [f"model={arguments.model}", f"precision={arguments.precision}", f"optimizer={arguments.optimizer}"]
    composed = compose_runs([rung], chosen)[rung]
    run, config = read_run(composed, layers=layers), mst_config(composed)
    training = replace(run.training, device=device.type)
    setting = Setting(run.build_model, training)
    predicted = setting.predict(config, length).tensors
    try:
        measured = run_steps(run.build_model, training, setting.step(length), config, device).tensors
    except torch.OutOfMemoryError:
        measured = None
    if device.type == "cuda":
        torch.cuda.empty_cache()
    print(f"{rung:10} {layers:2} layers {length:7,} tokens: predicted {predicted / GIB:.2f} GiB, ", end="")
    print("out of memory" if measured is None else f"measured {measured / GIB:.2f} ({predicted / measured:.3f})")
    sizes = {"predicted_gib": predicted / GIB, "measured_gib": measured and measured / GIB}
    return {"mst": rung, "layers": layers, "length": length, **sizes}


if __name__ == "__main__":
    main()
