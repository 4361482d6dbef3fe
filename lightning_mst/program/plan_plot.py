"""The figure of a plan. Needs matplotlib (``pip install 'lightning-mst[plots]'``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lightning_mst.program.plan_table import SHOWN, headline, label, unit_of

__all__ = ["plot_plan"]

INK = "#1f2933"
FAINT = "#9aa5b1"
# Okabe and Ito's colours, which people with any kind of colour vision tell apart; grey for what is always there.
KINDS = {
    "weights": ("weights", "#5b6770"),
    "gradients": ("gradients", "#e69f00"),
    "optimizer_states": ("optimizer states", "#b3bac2"),
    "activations_kept": ("activations, kept between layers", "#0072b2"),
    "activations_inside": ("activations, inside the worst block", "#56b4e9"),
    "logits": ("logits", "#d55e00"),
    "buffers": ("buffers and batch", "#009e73"),
    "overhead": ("device overhead", "#f0e442"),
}
LINES = ("#000000", "#d55e00", "#009e73", "#0072b2", "#cc79a7", "#e69f00", "#56b4e9")
STYLES = ("-", "--", "-.", (0, (5, 1)), ":", "-", "--")


def plot_plan(report: dict[str, Any], path: Path) -> None:
    """Draw what fills the memory at each setting's longest sequence, and memory against length.

    Args:
        report: What ``plan.json`` holds.
        path: The PNG file to write.
    """
    # Without pyplot there is no window system to choose, and no global state to clean up.
    figure = Figure(figsize=(11, 4.9), dpi=150, layout="constrained")
    bars, curves = figure.subplots(1, 2, width_ratios=(1, 1.15))
    draw_bars(bars, report)
    draw_curves(curves, report)
    figure.suptitle("\n".join(headline(report)), fontsize=9.5, color=INK, x=0.01, ha="left")
    figure.savefig(path)


def draw_bars(axes: Axes, report: dict[str, Any]) -> None:
    """A stack of kinds for each setting, at its longest sequence."""
    rungs, (unit, factor) = report["rungs"], unit_of(report)
    budget = factor * report["device_memory_gib"]
    names = [
        f"{label(rung)}\n{rung['max_length']:,} tokens" if rung["device_gib"] else f"{label(rung)}\nnone fits"
        for rung in rungs
    ]
    memories = [rung["device_gib"] or dict.fromkeys(KINDS, 0.0) for rung in rungs]
    bottoms = np.zeros(len(rungs))
    for kind, (text, color) in KINDS.items():
        heights = factor * np.array([memory[kind] for memory in memories])
        if (heights >= SHOWN).any():
            axes.bar(names, heights, bottom=bottoms, width=0.62, color=color, label=text, edgecolor="white", lw=0.6)
            for index, height in enumerate(heights):
                if height > 0.045 * budget:
                    axes.text(
                        index, bottoms[index] + height / 2, f"{height:.1f}", ha="center", va="center", fontsize=8,
                        color=_readable_on(color),
                    )  # fmt: skip
            bottoms += heights
    _device_line(axes, budget, unit)
    axes.set_ylim(0, 1.12 * budget)
    axes.set_title(f"Peak memory at the longest sequence ({unit})", fontsize=10, loc="left", color=INK)
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles[::-1], labels[::-1], loc="outside lower left", ncols=4, fontsize=8.5, frameon=False)
    tidy(axes)


def draw_curves(axes: Axes, report: dict[str, Any]) -> None:
    """Memory against length: straight between the lengths that were tried, on a logarithmic axis."""
    unit, factor = unit_of(report)
    budget = factor * report["device_memory_gib"]
    longest = max(rung["max_length"] for rung in report["rungs"])
    shortest = min(length for rung in report["rungs"] for length, _ in rung["curve"])
    top = max(2 * longest, 2 * shortest)
    for rung, color, style in zip(report["rungs"], LINES, STYLES, strict=False):
        lengths, sizes = np.array(rung["curve"], dtype=float).T * np.array([[1.0], [factor]])
        # Beyond the last two lengths that were tried it goes on as between them.
        grid = np.geomspace(lengths[0], top, 200)
        beyond = sizes[-1] + (grid - lengths[-1]) * _slope(lengths, sizes)
        axes.plot(
            grid, np.where(grid <= lengths[-1], np.interp(grid, lengths, sizes), beyond), color=color, linestyle=style,
            lw=1.8, label=label(rung),
        )  # fmt: skip
        if rung["device_gib"]:
            end = factor * sum(rung["device_gib"].values())
            axes.plot(rung["max_length"], end, "o", color=color, markersize=5)
    _device_line(axes, budget, unit)
    axes.set_xscale("log", base=2)
    axes.set_xlim(shortest, top)
    ticks = [2**n for n in range(int(np.ceil(np.log2(shortest))), int(np.log2(top)) + 1)]
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: max(1, len(ticks) // 9)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_tokens))
    axes.set_ylim(0, 1.12 * budget)
    axes.set_title(f"Peak memory ({unit}) against sequence length (tokens)", fontsize=10, loc="left", color=INK)
    axes.legend(loc="lower right", fontsize=9, frameon=False)
    axes.grid(axis="both", color="#e4e7eb", lw=0.6)
    axes.set_axisbelow(True)
    tidy(axes)


def _slope(lengths: np.ndarray, sizes: np.ndarray) -> float:
    return float((sizes[-1] - sizes[-2]) / (lengths[-1] - lengths[-2])) if len(lengths) > 1 else 0.0


def _device_line(axes: Axes, budget: float, unit: str) -> None:
    axes.axhline(budget, color=INK, lw=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"device: {budget:.1f} {unit}", (0, budget), xycoords=("axes fraction", "data"), xytext=(3, 3),
        textcoords="offset points", fontsize=8.5, color=INK,
    )  # fmt: skip


def _tokens(length: float, _: Any) -> str:
    if length >= 2**20:
        return f"{length / 2**20:g}M"
    return f"{length / 2**10:g}K" if length >= 2**10 else f"{length:g}"


def _readable_on(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else INK


def tidy(axes: Axes) -> None:
    """Small labels, and only the two lines that say where zero is."""
    axes.tick_params(labelsize=8.5, colors=INK, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
