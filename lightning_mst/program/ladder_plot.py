"""The figure of a ladder of settings. Needs matplotlib (``pip install 'lightning-mst[plots]'``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_mst.program.plan_plot import INK, KINDS, tidy
from lightning_mst.program.plan_table import PARTS, SHOWN, headline, label, unit_of

__all__ = ["plot_ladder"]

COLORS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00")
"""Okabe and Ito's, one for each part whose matmuls are counted."""


def plot_ladder(report: dict[str, Any], path: Path) -> None:
    """Draw for each rung its longest sequence, what it holds on device and host there, and what it computes.

    Args:
        report: What ``plan.json`` holds.
        path: The PNG file to write.
    """
    figure = Figure(figsize=(14, 1.9 + 0.52 * len(report["rungs"])), dpi=150, layout="constrained")
    lengths, device, host, passes = figure.subplots(1, 4, sharey=True, width_ratios=(1, 1.25, 0.9, 1))
    draw_lengths(lengths, report)
    draw_device(device, report)
    draw_host(host, report)
    draw_passes(passes, report)
    lengths.set_yticks(range(len(report["rungs"])), [label(rung) for rung in report["rungs"]])
    lengths.invert_yaxis()  # the first rung at the top, as in the table
    figure.suptitle("\n".join(headline(report)), fontsize=9.5, color=INK, x=0.01, ha="left")
    figure.savefig(path)


def draw_lengths(axes: Axes, report: dict[str, Any]) -> None:
    """The longest sequences."""
    values = [rung["max_length"] for rung in report["rungs"]]
    bars = axes.barh(range(len(values)), values, height=0.62, color=COLORS[0])
    axes.bar_label(bars, [f" {value:,}" if value else " none fits" for value in values], fontsize=8.5, color=INK)
    axes.set_xlim(0, 1.3 * max(values))
    axes.set_xticks([])  # every bar says its number
    _title(axes, "Longest sequence (tokens)")


def draw_device(axes: Axes, report: dict[str, Any]) -> None:
    """A stack of kinds of memory for each rung, at its longest sequence."""
    unit, factor = unit_of(report)
    rungs = report["rungs"]
    ends = np.zeros(len(rungs))
    for kind, (text, color) in KINDS.items():
        widths = factor * np.array([rung["device_gib"][kind] if rung["device_gib"] else 0.0 for rung in rungs])
        if (widths >= SHOWN).any():
            axes.barh(range(len(rungs)), widths, left=ends, height=0.62, color=color, label=text, ec="white", lw=0.5)
            ends += widths
    axes.axvline(factor * report["device_memory_gib"], color=INK, lw=1, linestyle=(0, (4, 3)))
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, loc="outside lower left", ncols=4, fontsize=8.5, frameon=False)
    _title(axes, f"On the device there ({unit})")


def draw_host(axes: Axes, report: dict[str, Any]) -> None:
    """What each rung keeps in the host's memory."""
    unit, factor = unit_of(report)
    sizes = [factor * (rung["host_gib"] or 0.0) for rung in report["rungs"]]
    bars = axes.barh(range(len(sizes)), sizes, height=0.62, color="#cc79a7")
    axes.bar_label(bars, [f" {size:,.1f}" if size >= SHOWN else "" for size in sizes], fontsize=8.5, color=INK)
    axes.set_xlim(0, 1.3 * max(*sizes, SHOWN))
    if report["host_memory_gib"] is not None:
        axes.axvline(factor * report["host_memory_gib"], color=INK, lw=1, linestyle=(0, (4, 3)))
    _title(axes, f"On the host ({unit})")


def draw_passes(axes: Axes, report: dict[str, Any]) -> None:
    """The matmuls of each part of the model."""
    height = 0.62 / len(PARTS)
    rows = np.arange(len(report["rungs"])) - 0.31 + height / 2
    for index, ((part, text), color) in enumerate(zip(PARTS.items(), COLORS, strict=True)):
        widths = [rung[f"{part}_passes"] or 0.0 for rung in report["rungs"]]
        axes.barh(rows + index * height, widths, height=0.85 * height, color=color, label=text)
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, loc="outside lower right", ncols=2, fontsize=8.5, frameon=False)
    _title(axes, "Matmuls, in forward passes of each part")


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=10, loc="left", color=INK)
    axes.grid(axis="x", color="#e4e7eb", lw=0.6)
    axes.set_axisbelow(True)
    tidy(axes)
