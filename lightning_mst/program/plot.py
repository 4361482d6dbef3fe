"""The chart of a comparison. Needs matplotlib (``pip install 'lightning-mst[plots]'``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_mst.program.compare import headline

__all__ = ["plot_comparison"]

REFERENCE_COLOR = "#9aa5b1"
COLOR = "#2f6db3"
INK = "#1f2933"


def plot_comparison(report: dict[str, Any], path: Path) -> None:
    """Draw peak memory and speed of each setting as bars, with their ratios to the first.

    Args:
        report: What :func:`lightning_mst.program.compare.compare` returned.
        path: The PNG file to write.
    """
    rows = report["settings"]
    # Without pyplot there is no window system to choose, and no global state to clean up.
    figure = Figure(figsize=(9.5, 1.5 + 0.55 * len(rows)), dpi=150, layout="constrained")
    memory, speed = figure.subplots(1, 2, sharey=True)
    names = [row["mst"] for row in rows]
    bars(memory, names, [row["peak_memory_gib"] for row in rows], "Peak memory (GiB), less is better", "{:.2f}")
    bars(speed, names, [row["tokens_per_second"] for row in rows], "Tokens per second, more is better", "{:,.0f}")
    memory.invert_yaxis()  # shared; the first setting on top, as in the table
    figure.suptitle(headline(report), fontsize=10, color=INK)
    figure.savefig(path)


def bars(axes: Axes, names: list[str], values: list[float | None], title: str, form: str) -> None:
    """One panel: a bar per setting, labelled with its value and its ratio to the first."""
    lengths = [value or 0.0 for value in values]
    colors = [REFERENCE_COLOR, *[COLOR] * (len(names) - 1)]
    drawn = axes.barh(names, lengths, color=colors, height=0.62)
    labels = []
    for value in values:
        label = "not measured" if value is None else form.format(value)
        if value and values[0] and value is not values[0]:
            label += f"  ({value / values[0]:.2f}x)"
        labels.append(label)
    axes.bar_label(drawn, labels, padding=4, fontsize=9, color=INK)
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.set_xlim(0, max(*lengths, 1e-9) * 1.38)  # room for the labels
    axes.tick_params(left=False, labelsize=9, colors=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(REFERENCE_COLOR)
