"""``lightning-mst plan --measure``: predicted against measured, for a few of the model's layers on the device here."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from lightning_mst.memory.prediction import Prediction, vocab_size_of
from lightning_mst.memory.quantized import with_scales
from lightning_mst.memory.rehearsal import Step
from lightning_mst.memory.setting import PRECISIONS, Setting, Training, default_dtype
from lightning_mst.memory.tensor_bytes import TensorBytes
from lightning_mst.program.errors import ConfigurationError
from lightning_mst.program.plan_arguments import STDOUT, Arguments
from lightning_mst.program.plan_config import compose_runs, mst_config, read_run
from lightning_mst.program.tables import console, print_table
from lightning_mst.rewrite.config import MSTConfig
from lightning_mst.rewrite.handle import apply_mst
from lightning_mst.units import GIB

__all__ = ["Measured", "measure", "real_model", "run_steps", "take_step"]

LAYERS = 4
STEPS = 3  # the first leaves the optimizer's states, the second what libraries set up late; the third is measured


@dataclass(frozen=True)
class Measured:
    """One real step.

    Attributes:
        tensors: Peak bytes of tensors: the allocator's, or on a CPU those that a tracker counted.
        reserved: Bytes that the allocator held for them; None on a CPU.
        used: Bytes of the device in use right after the step, by whatever program; None on a CPU.
        overhead: Bytes beside the tensors: what the driver took, and what is left in the allocator without the model
            (matmul workspaces); None on a CPU.
    """

    tensors: int
    reserved: int | None = None
    used: int | None = None
    overhead: int | None = None


def measure(arguments: Arguments) -> None:
    """Run real steps of a few layers under each setting, and print what was predicted beside what was measured.

    Args:
        arguments: The command line.

    Raises:
        ConfigurationError: The run has several devices.
    """
    configs = compose_runs(arguments.settings, arguments.overrides)
    run = read_run(next(iter(configs.values())), layers=LAYERS)
    if run.training.num_devices > 1:
        raise ConfigurationError(
            f"trainer.devices: --measure runs on one device, got {run.training.num_devices}. Set trainer.devices=1"
        )
    on_gpu = run.training.device == "cuda" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    run = replace(run, training=replace(run.training, device=device.type))
    length = arguments.length or run.sequence_length
    rows = []
    for name, config in configs.items():
        with Console(stderr=True).status(
            f"mst={name}: {STEPS} steps of {run.batch_size} x {length:,} tokens on {device}"
        ):
            setting = Setting(run.build_model, run.training)
            predicted = setting.predict(mst_config(config), length, run.batch_size)
            step = setting.step(length, run.batch_size)
            measured = run_steps(run.build_model, run.training, step, mst_config(config), device)
        rows.append(as_dict(name, predicted, measured))
    report = {
        "model": run.model,
        "layers": LAYERS,
        "precision": run.training.precision,
        **run.as_dict(),
        "batch_size": run.batch_size,
        "sequence_length": length,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "rungs": rows,
    }
    numbers = json.dumps(report, indent=2) + "\n"
    if arguments.json == STDOUT:
        print(numbers, end="")
    else:
        show(report)
    paths = [arguments.output / "measured.json"] if arguments.output is not None else []
    paths += [Path(arguments.json)] if arguments.json not in (None, STDOUT) else []
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(numbers, encoding="utf-8")


def run_steps(
    build_model: Callable[[], nn.Module], training: Training, step: Step, config: MSTConfig, device: torch.device
) -> Measured:
    """Takes real steps with random weights and tokens, and measures the last.

    Args:
        build_model: Builds the model.
        training: How it is trained.
        step: Its step; of the batch only the shape counts.
        config: The form of the model.
        device: Where.
    """
    held = TensorBytes()
    model = real_model(build_model, training, device)
    held.count(with_scales(model.parameters()), "weights")
    held.count(model.buffers(), "buffers")
    if not config.asks_for_nothing:
        apply_mst(model, config)
    with nullcontext() if device.type == "cuda" else held:
        optimizer = training.make_optimizer(model)
        tokens = torch.randint(vocab_size_of(model) or 2, step.batch["input_ids"].shape, device=device)
        batch = {"input_ids": tokens, "labels": tokens}
        for index in range(STEPS):
            if index == STEPS - 1:
                held.forget_peaks()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
            take_step(model, optimizer, batch, step, accumulates=step.accumulates and index > 0)
    if device.type != "cuda":
        held.freeze()
        return Measured(held.peak)
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    tensors, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    context = total - free - torch.cuda.memory_reserved()
    del model, optimizer, batch, tokens
    gc.collect()
    torch.cuda.empty_cache()
    return Measured(tensors, reserved, total - free, context + torch.cuda.memory_allocated())


def real_model(build_model: Callable[[], nn.Module], training: Training, device: torch.device) -> nn.Module:
    """The model as ``Trainer`` makes it, with random weights, in train mode."""
    dtype, _ = PRECISIONS[training.precision]
    torch.manual_seed(0)
    with default_dtype(dtype), device:
        model = build_model()
        if training.precision.endswith("-true"):
            model = model.to(dtype)
        return training.prepare(model).train()


def take_step(model: nn.Module, optimizer: Any, batch: dict[str, Tensor], step: Step, *, accumulates: bool) -> None:
    """One step, in Lightning's order."""
    with torch.autocast(batch["labels"].device.type, dtype=step.autocast) if step.autocast else nullcontext():
        loss = step.compute_loss(model, batch)
    if not accumulates:
        optimizer.zero_grad()
    loss.backward()
    if not accumulates:
        optimizer.step()


def as_dict(name: str, predicted: Prediction, measured: Measured) -> dict[str, Any]:
    """A row of the report; memory in GiB."""
    return {
        "mst": name,
        "predicted_gib": predicted.tensors / GIB,
        "measured_gib": measured.tensors / GIB,
        "reserved_gib": _gib(measured.reserved),
        "used_gib": _gib(measured.used),
        "overhead_gib": _gib(measured.overhead),
    }


def _gib(size: int | None) -> float | None:
    return None if size is None else size / GIB


def show(report: dict[str, Any]) -> None:
    """Print the rows, and what they say about the device."""
    rows, on_gpu = report["rungs"], report["device"] != "cpu"
    columns = ["mst", "predicted (GiB)", "measured (GiB)", "predicted / measured"]
    columns += ["reserved (GiB)", "in use (GiB)", "overhead (GiB)"] if on_gpu else []
    cells = [
        [
            row["mst"],
            f"{row['predicted_gib']:.3f}",
            f"{row['measured_gib']:.3f}",
            f"{row['predicted_gib'] / row['measured_gib']:.3f}",
            *([f"{row[key]:.3f}" for key in ("reserved_gib", "used_gib", "overhead_gib")] if on_gpu else []),
        ]
        for row in rows
    ]
    print_table(
        f"{report['model']}, at most {report['layers']} layers, {report['precision']}, {report['optimizer']}: peak of "
        f"a step of {report['batch_size']} x {report['sequence_length']:,} tokens on {report['device']}",
        columns,
        cells,
    )
    if on_gpu:
        worst = max(row["overhead_gib"] for row in rows)
        text = (
            "Measured is torch.cuda.max_memory_allocated(), which holds the matmul workspaces, too. In use is all "
            "memory of the device, other programs' included. If this one ran alone, the overhead is "
            f"{worst * 1024:.0f} MiB: what lightning_mst/memory/devices.py should say for this device."
        )
    else:
        text = (
            "No GPU was used: measured are the exact bytes of the CPU's tensors, predicted those for a CPU, which has "
            "no overhead. The overhead of a GPU is to be measured where there is one."
        )
    console().print(text, style="dim", highlight=False)
