"""Folders of runs as `lightning-mst train` leaves them. All numbers are made up: test data, not measurements."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

GPU = "Test GPU 80GB"
COMMON = {"device": GPU, "versions": {"torch": "2.13.0", "lightning_mst": "0.1.0"}, "date": "2026-11-23"}
TRAIN = {
    "task": "train", "model": "llama_small", "mst_name": "auto", "precision": "32-true", "strategy": "auto",
    "devices": 1, "quantization": None, "adapter": None, "seed": 0, "sequence_length": 4096, "batch_size": 1,
    "parameters": 8_128_768, "steps": 4, "loss": 7.0, "losses": [8.0, 7.5, 7.2, 7.0], "val_perplexity": 999.0,
    "tokens_per_second": 1105.0, "peak_memory_gib": 0.623,
}  # fmt: skip


def write_run(
    folder: Path,
    result: dict[str, Any] | None,
    *,
    overrides: tuple[str, ...] = (),
    choices: dict[str, str] | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """A run's folder; one without a result has died. Without overrides, choices and config, it is a bare result."""
    folder.mkdir(parents=True)
    if result is not None:
        completed = result.get("status", "completed") == "completed"
        whole = {"status": "completed", **COMMON, **result} if completed else result
        (folder / "result.json").write_text(json.dumps(whole))
    if overrides or choices or config:
        (folder / ".hydra").mkdir()
        number = int(folder.name) if folder.name.isdigit() else "???"
        hydra = {"hydra": {"job": {"num": number}, "runtime": {"choices": choices or {}}}}
        for name, content in (("overrides", list(overrides)), ("hydra", hydra), ("config", config or {})):
            (folder / ".hydra" / f"{name}.yaml").write_text(yaml.safe_dump(content))


def write_sweep(
    folder: Path, experiment: str | None, runs: list[tuple[dict[str, str], dict[str, Any] | None]], **more: Any
) -> Path:
    """A sweep's folder.

    Args:
        folder: Where.
        experiment: The file of ``conf/experiment``.
        runs: What each run overrides, and its result: None if it died.
        more: Of all runs, as for ``write_run``.
    """
    for number, (swept, result) in enumerate(runs):
        overrides = [*(f"{key}={value}" for key, value in swept.items()), f"experiment={experiment}"]
        choices = {"experiment": experiment or "null", "task": (result or {}).get("task", "train")}
        write_run(
            folder / str(number),
            result and {"experiment": experiment, **result},
            overrides=tuple(overrides if experiment else overrides[:-1]),
            choices={**choices, **more.get("choices", {})},
            config=more.get("config"),
        )
    (folder / "multirun.yaml").write_text("{}\n")
    return folder


def longest(**settings: Any) -> dict[str, Any]:
    return {
        "task": "longest", "model": "llama3_8b", "mst_name": "off", "precision": "bf16-true", "quantization": None,
        "adapter": None, "optimizer": "adamw_in_backward", "accumulate_grad_batches": 1, "batch_size": 1,
        "longest": 5000, "peak_gib": 79.4, "memory_gib": 80.0, "how": "measured", **settings,
    }  # fmt: skip


def max_length_runs() -> list[dict[str, Any]]:
    lengths = {
        "llama3_8b": (4989, 14012, 101_000, 120_300), "llama2_7b": (7300, 43_000, 130_000, 140_900),
        "mistral_7b": (6600, 40_000, 110_000, 139_000), "qwen2_7b": (4200, 12_500, 94_000, 120_000),
        "gemma2_9b": (1900, 5600, 45_000, 60_000),
    }  # fmt: skip
    return [
        longest(model=model, mst_name=mst, longest=length)
        for model, row in lengths.items()
        for mst, length in zip(("off", "recompute", "paper", "auto"), row, strict=True)
    ]


def throughput(**settings: Any) -> dict[str, Any]:
    return {
        "task": "throughput", "model": "llama3_8b", "mst_name": "off", "precision": "bf16-true",
        "optimizer": "adamw_in_backward", "sequence_length": 8192, "batch_size": 1, "batch": 1, "fits": True,
        "seconds_per_step": 2.0, "tokens_per_second": 4096.0, "peak_gib": 60.0, "memory_gib": 80.0, "how": "measured",
        **settings,
    }  # fmt: skip


def throughput_runs() -> list[dict[str, Any]]:
    runs = []
    for batch in (1, 2, "largest"):
        for mst, largest, speed in (
            ("off", 0, 0),
            ("recompute", 2, 5000.0),
            ("paper", 10, 4900.0),
            ("auto", 14, 4950.0),
        ):
            size = largest if batch == "largest" else batch
            fits = 0 < size <= largest
            runs.append(
                throughput(
                    mst_name=mst, batch=batch, batch_size=size, fits=fits,
                    tokens_per_second=speed + size if fits else None,
                    seconds_per_step=size * 8192 / (speed + size) if fits else None,
                    peak_gib=46.0 + 30.0 * size / largest if fits else None,
                )
            )  # fmt: skip
    return runs


def block(name: str, length: int, **settings: Any) -> dict[str, Any]:
    chunks = (2, 4, 8, 16, 32) if name == "lm_head" else (2, 4, 8)
    standard = 0.75 * length / 1000 if name == "lm_head" else 0.184 * length / 1000
    fits = standard < 70
    rows = [{"num_chunks": None, "seconds": length * 2e-5 if fits else None, "peak_gib": standard if fits else None}]
    floor = 3.0 if name == "lm_head" else 0.13 * length / 1000
    rows += [
        {"num_chunks": m, "seconds": length * 2e-5 * (1 + m / 200), "peak_gib": floor + standard / m} for m in chunks
    ]
    return {
        "task": "block", "block": name, "model": "llama3_8b", "sequence_length": length, "hidden_size": 4096,
        "intermediate_size": 14336, "vocab_size": 128_256, "precision": "bf16-true", "how": "measured", "rows": rows,
        **settings,
    }  # fmt: skip


LENGTHS = (1024, 4096, 8192, 16384, 20480, 40960, 80_000)


def breakdown_runs() -> list[dict[str, Any]]:
    def run(mst: str, optimizer: str, kept: float, inside: float, logits: float, gradients: float) -> dict[str, Any]:
        kinds = {
            "weights": 14.96, "gradients": gradients, "optimizer_states": 29.92, "activations_kept": kept,
            "activations_inside": inside, "logits": logits, "buffers": 0.01, "overhead": 0.5,
        }  # fmt: skip
        return {
            "task": "breakdown", "model": "llama3_8b", "mst_name": mst, "precision": "bf16-true",
            "optimizer": optimizer, "sequence_length": 4096, "batch_size": 1, "kinds_gib": kinds,
            "peak_gib": sum(kinds.values()), "where": "backward of the loss",
            "measured_peak_gib": sum(kinds.values()) - 0.3, "how": "measured",
        }  # fmt: skip

    return [
        run("off", "adamw", 17.0, 1.0, 5.9, 14.96),
        run("off", "adamw_in_backward", 17.0, 5.9, 5.9, 0.5),
        run("recompute", "adamw_in_backward", 1.0, 0.2, 5.9, 0.5),
        run("paper", "adamw_in_backward", 1.0, 0.4, 0.4, 0.9),
    ]


def losses(steps: int, noise: float) -> list[float]:
    return [5.0 + 3.6 * math.exp(-step / 60) + noise * step * math.sin(7.0 * step) for step in range(steps)]


def convergence_runs() -> list[dict[str, Any]]:
    curves = {"off": losses(300, 0.0), "auto": losses(300, 4e-8), "paper": losses(300, 7e-8)}
    return [
        {**TRAIN, "mst_name": mst, "steps": 300, "losses": curve, "loss": curve[-1]} for mst, curve in curves.items()
    ]


def context_runs() -> list[dict[str, Any]]:
    perplexities = {512: (60.0, 58.0, 61.0, 74.0, 98.0), 8192: (63.0, 57.0, 53.0, 50.5, 49.0)}
    contexts = ("512", "1024", "2048", "4096", "8192")
    return [
        {**TRAIN, "sequence_length": length, "context_perplexity": dict(zip(contexts, row, strict=True))}
        for length, row in perplexities.items()
    ]


def timeline(form: str, source: str, height: float) -> dict[str, Any]:
    gib = 2**30
    visits = []
    for phase in ("forward", "backward"):
        order = range(8) if phase == "forward" else range(7, -1, -1)
        for layer in order:
            held = (layer + 1) / 8 * height
            for kind, extra in (("attn", 0.2), ("mlp", 0.4)):
                live = [round((4 + held + extra * height * part) * gib) for part in (0.2, 1.0, 0.1)]
                visits.append(
                    {"phase": phase, "layer": f"layers.{layer}", "block": kind, "group": "MLP", "live_bytes": live}
                )
        if phase == "forward":
            live = [round((4 + 1.3 * height) * gib)]
            visits.append({"phase": phase, "layer": "", "block": "lm_head", "group": "LM head", "live_bytes": live})
    visits.append(
        {"phase": "optimizer", "layer": "", "block": "", "group": "optimizer", "live_bytes": [5 * gib, 4 * gib]}
    )
    peak = max(value for visit in visits for value in visit["live_bytes"])
    return {
        "form": form, "source": source, "peak_bytes": peak, "peak_where": "backward of layers.7, mlp",
        "persistent_bytes": 4 * gib, "visits": visits,
    }  # fmt: skip


def write_everything(folder: Path) -> Path:
    """A sweep of each experiment, at the paper's size."""

    def over(runs: list[dict[str, Any]], **keys: str) -> list[tuple[dict[str, str], dict[str, Any] | None]]:
        """Each run, with the overrides that led to these of its values."""
        return [({key: str(run[name]) for key, name in keys.items()}, run) for run in runs]

    accumulated = [
        longest(model=model, mst_name=mst, accumulate_grad_batches=8, longest=length, optimizer="adamw")
        for model, lengths in {"llama3_8b": (9000, 50_000, 61_000), "llama2_7b": (30_000, 90_000, 99_000)}.items()
        for mst, length in zip(("recompute", "paper", "auto"), lengths, strict=True)
    ]
    quantized = [
        longest(mst_name=mst, quantization=weights, adapter="lora", longest=length, optimizer="adamw")
        for weights, lengths in {"int8": (17_000, 180_000, 210_000), "nf4": (20_000, 200_000, 235_000)}.items()
        for mst, length in zip(("off", "paper", "auto"), lengths, strict=True)
    ]
    both = {"model": "model", "mst": "mst_name"}
    sweeps = {
        "max_length": over(max_length_runs(), **both),
        "max_length_accumulation": over(accumulated, **both),
        "max_length_quantized": over(quantized, precision="quantization", mst="mst_name"),
        "throughput": over(throughput_runs(), **{"mst": "mst_name", "task.batch": "batch"}),
        "lm_head": over(
            [block("lm_head", length) for length in LENGTHS], **{"data.sequence_length": "sequence_length"}
        ),
        "mlp": over([block("mlp", length) for length in LENGTHS], **{"data.sequence_length": "sequence_length"}),
        "breakdown": over(breakdown_runs(), mst="mst_name", optimizer="optimizer"),
        "timeline": over([{**TRAIN, "mst_name": mst} for mst in ("recompute", "paper", "auto")], mst="mst_name"),
        "convergence": over(convergence_runs(), mst="mst_name"),
        "long_context": over(context_runs(), **{"data.sequence_length": "sequence_length"}),
    }
    for name, runs in sweeps.items():
        write_sweep(folder / name, f"paper/{name}", runs)
    for number, height in enumerate((4.0, 2.0, 1.6)):
        lines = [timeline("standard", "modelled", 10.0), timeline("mini-sequences", "measured", height)]
        path = folder / "timeline" / str(number) / "memory_timeline.json"
        path.write_text(json.dumps({"title": "", "note": "", "timelines": lines}))
    chunks_and_precisions = [
        ({"mst.mlp_chunks": str(chunks), "precision": precision}, {**TRAIN, "precision": precision, **measured})
        for chunks in (1, 2, 4, 8)
        for precision, factor in (("32-true", 1.0), ("bf16-true", 0.5))
        for measured in [{"peak_memory_gib": factor * (0.3 + 0.4 / chunks), "tokens_per_second": 1100.0 - 20 * chunks}]
    ]
    write_sweep(folder / "chunks", None, chunks_and_precisions)
    return folder
