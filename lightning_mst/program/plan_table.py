"""A plan as tables in the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.padding import Padding
from rich.table import Table

from lightning_mst.program.tables import console, describe_model, number

__all__ = ["PARTS", "headline", "label", "show"]

HEADERS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer_states": "optimizer\nstates",
    "activations_kept": "kept\nbetween\nlayers",
    "activations_inside": "inside\nworst\nblock",
    "logits": "logits",
    "buffers": "buffers",
    "overhead": "device",
}
"""Kinds of memory, in the order of ``lightning_mst.memory.prediction.KINDS``."""
PARTS = {
    "projection": "projections",
    "attention": "attention",
    "mlp": "MLP",
    "lm_head": "LM head",
}
"""Parts of a model whose matmuls are counted, in the order of a layer."""
SHOWN = 0.005  # what would be 0.00 in every row gets no column


def show(report: dict[str, Any]) -> None:
    """Print a plan: a row for each mini-sequence setting, what a wanted length takes, and what was modelled.

    Args:
        report: What ``plan.json`` holds.
    """
    terminal = console()
    model, training = headline(report)
    terminal.print(model, style="bold", highlight=False)
    terminal.print(f"{training} ({report['device_memory_of']})", highlight=False)
    terminal.print(_rungs(report))
    terminal.print(_steps(report))
    if report["wanted"]:
        for line in wanted_lines(report):
            terminal.print(line, highlight=False)
    for note in report["notes"]:
        terminal.print(Padding(note, (0, 0, 0, 1)), style="dim", highlight=False)


def unit_of(report: dict[str, Any]) -> tuple[str, float]:
    """The unit of memory to show, and how many of it a GiB has."""
    return ("GiB", 1.0) if report["device_memory_gib"] >= 1 else ("MiB", 1024.0)


def headline(report: dict[str, Any]) -> tuple[str, str]:
    """What a plan is for: the model, and how it is trained."""
    batch = f"batch size {report['batch_size']}"
    if report["accumulate_grad_batches"] > 1:
        batch += f" x {report['accumulate_grad_batches']} accumulated"
    several = report["num_devices"] > 1
    devices = f"{report['num_devices']} devices ({report['strategy']})" if several else "one device"
    unit, factor = unit_of(report)
    memory = f"{report['device_memory_gib'] * factor:.2f} {unit}{' each' if several else ''}"
    if report["host_memory_gib"] is not None:
        memory += f" and {report['host_memory_gib'] * factor:.2f} {unit} of the host"
    return describe_model(report), f"{report['optimizer']}, {batch}, {devices} with {memory}"


def label(rung: dict[str, Any]) -> str:
    """What a rung is called: its setting, and the optimizer that takes the place of the run's own, if one does."""
    return rung["mst"] if rung["optimizer"] is None else f"+ {rung['optimizer']}"


def _rungs(report: dict[str, Any]) -> Table:
    rungs, (unit, factor) = report["rungs"], unit_of(report)
    fitting = [rung["device_gib"] for rung in rungs if rung["device_gib"]]
    kinds = [kind for kind in HEADERS if any(factor * memory[kind] >= SHOWN for memory in fitting)]
    on_host = any(factor * (rung["host_gib"] or 0) >= SHOWN for rung in rungs)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column("mst", no_wrap=True)
    table.add_column("longest\n(tokens)", justify="right", style="bold", no_wrap=True)
    for kind in kinds:
        table.add_column(HEADERS[kind], justify="right", no_wrap=True)
    table.add_column(f"peak\n({unit})", justify="right", style="bold", no_wrap=True)
    if on_host:
        table.add_column(f"host\n({unit})", justify="right", no_wrap=True)
    for rung in rungs:
        memory = rung["device_gib"]
        cells = [label(rung), f"{rung['max_length']:,}" if memory else "none fits"]
        cells += [f"{factor * memory[kind]:.2f}" if memory else "-" for kind in kinds]
        cells += [f"{factor * sum(memory.values()):.2f}" if memory else "-"]
        cells += [f"{factor * rung['host_gib']:.2f}" if memory else "-"] if on_host else []
        table.add_row(*cells)
    return table


def _steps(report: dict[str, Any]) -> Table:
    """Where each setting's peak is, and what a step computes."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column("mst", no_wrap=True)
    table.add_column("peak in", no_wrap=True)
    for part in PARTS.values():
        table.add_column(f"{part}\npasses", justify="right", no_wrap=True)
    for rung in report["rungs"]:
        table.add_row(label(rung), rung["peak"] or "-", *(number(rung[f"{part}_passes"], 2) for part in PARTS))
    return table


def wanted_lines(report: dict[str, Any]) -> list[str]:
    """What a wanted length takes, or by how much it is too long."""
    wanted, (unit, factor) = report["wanted"], unit_of(report)
    memory = {kind: factor * size for kind, size in wanted["device_gib"].items()}
    total, length = sum(memory.values()), f"{wanted['sequence_length']:,} tokens"
    if wanted["fits"]:
        return [
            f"[bold]{length}[/bold] take mst.mlp_chunks={wanted['mlp_chunks']} "
            f"mst.lm_head_chunks={wanted['lm_head_chunks']}, the smallest numbers of mini-sequences that fit: "
            f"{total:.2f} {unit} ({wanted['peak']})",
            "",
        ]
    parts = ", ".join(f"{size:.2f} {' '.join(HEADERS[kind].split())}" for kind, size in memory.items() if size >= SHOWN)
    return [
        f"[bold]{length}[/bold] do not fit with any number of mini-sequences: {total:.2f} {unit} ({parts}), which is "
        f"{total - factor * report['device_memory_gib']:.2f} {unit} too much",
        "",
    ]
