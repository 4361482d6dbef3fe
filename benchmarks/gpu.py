"""``python -m benchmarks.gpu [PART ...]``: what needs a GPU: tests, benchmarks and the paper's experiments, in parts.

Every part is a program of its own and is stopped after ten minutes; the others go on. Results of the benchmarks go to
``benchmarks/results``, the experiments' and what each part took to ``--output``, with one report of all of them.
``paper/long_context`` is no part: it needs documents, and hours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

LIMIT = 600
"""Seconds."""
MODELS = ("llama3_8b", "llama2_7b", "mistral_7b", "qwen2_7b", "gemma2_9b")
RUNGS = ("off,recompute", "paper", "auto")
WHOLE = ("lm_head", "mlp", "breakdown", "timeline")


def parts(output: Path) -> dict[str, list[str]]:
    """The arguments of Python for each part."""
    commands = {"tests": ["-m", "pytest", "-m", "gpu"]}
    for block in ("head", "mlp", "losses", "step", "layers"):
        commands[f"benchmark-{block}"] = ["-m", "benchmarks.run", block]
    commands["planner"] = ["-m", "benchmarks.gpu_memory"]
    settings = ["recompute", "paper", "layer", "layer_offload", "layer_offload_attention"]
    lengths = ["--lengths", "32768", "131072", "262144", "--layers", "4", "--output", "gpu-memory-layers.json"]
    commands["planner-layers"] = ["-m", "benchmarks.gpu_memory", "--mst", *settings, *lengths]
    commands["offload"] = ["-m", "benchmarks.gpu_offload"]
    commands["longest"] = ["-m", "benchmarks.gpu_longest"]

    def experiment(part: str, name: str, *overrides: str) -> None:
        folder = f"hydra.sweep.dir='{output / part}'"
        commands[part] = ["-m", "lightning_mst", "train", "-m", f"experiment=paper/{name}", folder, *overrides]

    for name in WHOLE:
        experiment(name, name)
    for mst in RUNGS:
        label = mst.replace(",", "-")
        for model in MODELS:
            experiment(f"max-length-{model}-{label}", "max_length", f"model={model}", f"mst={mst}")
        experiment(f"throughput-{label}", "throughput", f"mst={mst}")
    for model in MODELS[:2]:
        for mst in ("recompute", "paper", "auto"):
            overrides = f"model={model}", f"mst={mst}"
            experiment(f"max-length-accumulation-{model}-{mst}", "max_length_accumulation", *overrides)
    for precision in ("int8-lora", "nf4-lora"):
        for mst in ("off", "paper", "auto"):
            overrides = f"precision={precision}", f"mst={mst}"
            experiment(f"max-length-{precision}-{mst}", "max_length_quantized", *overrides)
    experiment("throughput-llama2", "throughput_llama2")
    # Learning curves of the whole 300 steps take hours; these show that the two forms agree.
    experiment("convergence", "convergence", "trainer.max_steps=20")
    return commands


def main() -> None:
    arguments, commands = parse()
    if arguments.list:
        for name, command in commands.items():
            print(f"{name:45} python {' '.join(command)}")
        return
    if not torch.cuda.is_available():
        raise SystemExit("No GPU was found. --list shows what would run on one.")
    arguments.output.mkdir(parents=True, exist_ok=True)
    took: dict[str, dict[str, float | str]] = {}
    for name in arguments.parts or commands:
        took[name] = run(name, commands[name])
        (arguments.output / "parts.json").write_text(json.dumps(took, indent=1) + "\n")
    if any(arguments.output.rglob("result.json")):
        subprocess.run([sys.executable, "-m", "lightning_mst", "report", str(arguments.output)], check=True)
    failed = [name for name, part in took.items() if part["ended"] != "well"]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(took)} parts did not end well: {', '.join(failed)}")


def parse() -> tuple[argparse.Namespace, dict[str, list[str]]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all, see --list")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--list", action="store_true", help="show the parts and their commands, and run nothing")
    arguments = parser.parse_args()
    commands = parts(arguments.output)
    unknown = [name for name in arguments.parts if name not in commands]
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; --list shows them")
    return arguments, commands


def run(name: str, command: list[str]) -> dict[str, float | str]:
    """Runs a part; says how long it took and how it ended: well, failed, or stopped."""
    print(f"\n--- {name}", flush=True)
    start = time.monotonic()
    try:
        code = subprocess.run([sys.executable, *command], timeout=LIMIT, check=False).returncode
        ended = "well" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        ended = f"stopped after {LIMIT} s"
    seconds = round(time.monotonic() - start, 1)
    print(f"--- {name}: {ended}, {seconds} s", flush=True)
    return {"seconds": seconds, "ended": ended}


if __name__ == "__main__":
    main()
