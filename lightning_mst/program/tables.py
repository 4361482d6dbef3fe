"""Results as tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["describe_model", "print_summary", "print_table"]


def print_summary(result: dict[str, Any], folder: Path) -> None:
    """Print the result of one training run, as :func:`lightning_mst.program.train.train` returns it."""
    mst = result["mst"]
    settings = {key: mst[key] for key in ("mlp_chunks", "lm_head_chunks", "checkpoint_layers")}
    # What few ask for is told where somebody does.
    settings |= {key: mst[key] for key in ("layer_chunks", "checkpoint_offload") if mst[key] is not None}
    table = Table(title="Training run", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    where = result.get("peak_memory_where")
    devices = f"{result['devices']} ({result['strategy']})" if result["devices"] > 1 else None
    for name, value in {
        "model": describe_model(result),
        "devices": devices,
        "mini-sequences": ", ".join(f"{key}={'off' if value is None else value}" for key, value in settings.items()),
        f"tokens per step{' and device' if devices else ''}": f"{result['batch_size']} x {result['sequence_length']:,}",
        "steps": str(result["steps"]),
        "loss of the last step": number(result["loss"], 4),
        "validation perplexity": number(result["val_perplexity"], 2),
        "perplexity by context": _by_context(result.get("context_perplexity")),
        "tokens per second": number(result["tokens_per_second"], 0),
        "peak memory (GiB)": number(result["peak_memory_gib"], 3) + (f", {where}" if where else ""),
        "written to": str(folder),
    }.items():
        if value is not None:
            table.add_row(name, value)
    console().print(table)


def _by_context(perplexities: dict[str, float] | None) -> str | None:
    return ", ".join(f"{length}: {number(value, 2)}" for length, value in (perplexities or {}).items()) or None


def describe_model(result: dict[str, Any]) -> str:
    """What was trained, of a result or of what several share: name, size, what of it is trained, and in which form."""
    parameters, trained = result["parameters"], result.get("trainable_parameters")
    size = f"{parameters:,} parameters" + (f" ({trained:,} trained)" if trained not in (None, parameters) else "")
    quantization, adapter = result.get("quantization"), result.get("adapter")
    weights = [f"{quantization} weights"] if quantization else []
    return ", ".join([result["model"] or "model", size, *weights, *([adapter] if adapter else []), result["precision"]])


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text under a title; all columns but the first are aligned to the right."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def console() -> Console:
    """The terminal, or a file that is wide enough for a table's columns not to be folded."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=max(terminal.width, 120))


def number(value: float | None, digits: int) -> str:
    """A number for people, or a dash for what was not measured."""
    return "-" if value is None else f"{value:,.{digits}f}"
