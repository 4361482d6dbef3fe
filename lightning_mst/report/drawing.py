"""What the drawings of a report share. Matplotlib is used through the axes that are given, and never imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, floor, log, log10
from typing import TYPE_CHECKING, Any

from lightning_mst.report.view import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "FAINT", "INK", "PALETTE", "amount_ticks", "colors_of", "differing", "draw_bars", "draw_lines", "finish",
    "from_zero", "label_of", "length_ticks", "number_ticks", "short_length", "whole_decades",
]  # fmt: skip

INK, FAINT = "#1f2933", "#9aa5b1"
# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7a5195")
MARKERS = "osD^vP*X"
_SETTINGS = {
    "off": FAINT,
    "recompute": "#e69f00",
    "paper": "#56b4e9",
    "auto": "#0072b2",
    "layer": "#000000",
    "layer_offload": "#7a5195",
    "layer_offload_attention": "#8c564b",
    "fit": "#009e73",
    "no_recompute": "#cc79a7",
    "lm_head_only": "#d55e00",
}
_SPACE = 0.8  # between groups of bars, in bars


def colors_of(names: Sequence[str]) -> dict[str, Any]:
    """A colour for each name: always the same for a file of ``conf/mst``."""
    others = [name for name in dict.fromkeys(names) if name not in _SETTINGS]
    more = {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(others)}
    return {name: _SETTINGS.get(name, more.get(name)) for name in names}


def differing(rows: Sequence[Row], keys: Sequence[str]) -> list[str]:
    """The keys whose values differ between rows."""
    return [key for key in keys if len({row.get(key) for row in rows}) > 1]


def label_of(row: Row, keys: Sequence[str], separator: str = ", ") -> str:
    """The values of these keys as text."""
    parts = []
    for key in keys:
        value = row.get(key)
        if key == "sequence_length" and value is not None:
            parts.append(f"{short_length(value)} tokens")
        elif key == "batch":
            parts.append(f"{value} batch" if value == "largest" else f"batch {value}")
        elif key == "accumulate_grad_batches":
            parts.append(f"{value} accumulated")
        elif key == "mst_name":
            parts.append(f"mst={value}")
        else:
            parts.append(str(value))
    return separator.join(parts)


def short_length(length: float) -> str:
    """``"60K"`` for 61,440 tokens; what is no multiple of 1,024 is written out."""
    return f"{length // 1024:,.0f}K" if length and length % 1024 == 0 else f"{length:,.0f}"


def draw_bars(
    axes: Axes,
    rows: Sequence[Row],
    value: str,
    *,
    groups: Sequence[str],
    form: Callable[[float], str],
    marker: str | None = None,
    missing: Callable[[Row], str],
) -> None:
    """A bar for each row, in the colour of its mini-sequence setting, next to those of its group.

    Args:
        axes: Where.
        rows: In any order.
        value: The key of the heights.
        groups: The keys that make a group.
        form: Writes a height.
        marker: The key of another value, which is marked.
        missing: What to write where there is no value.
    """
    colors = colors_of([str(row["mst_name"]) for row in rows])
    by_group: dict[str, list[Row]] = {}
    for row in rows:
        by_group.setdefault(label_of(row, groups, "\n"), []).append(row)
    highest = max((row[key] or 0.0 for row in rows for key in (value, marker) if key), default=0.0) or 1.0
    x, centers = 0.0, []
    for members in by_group.values():
        centers.append(x + (len(members) - 1) / 2)
        for row in members:
            height, mark = row[value], row[marker] if marker else None
            hatch = None if row["how"] == "measured" else "///"
            color = colors[str(row["mst_name"])]
            axes.bar(x, height or 0.0, width=0.9, color=color, hatch=hatch, edgecolor="white", linewidth=0)
            if mark is not None:
                axes.plot(x, mark, marker="D", markersize=5, color=INK, markeredgecolor="white", zorder=4)
            if height is None:
                axes.text(x, 0.01 * highest, missing(row), rotation=90, ha="center", va="bottom", fontsize=8, color=INK)
            else:
                # Above the mark, if that would be in the way.
                near = mark is not None and height - 0.03 * highest < mark < height + 0.1 * highest
                top = max(height, mark or 0.0) + 0.025 * highest if near else height
                axes.annotate(
                    form(height), (x, top), xytext=(0, 2), textcoords="offset points", ha="center", va="bottom",
                    fontsize=7.5 if len(rows) < 16 else 5.8, color=INK, zorder=3,
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
                )  # fmt: skip
            x += 1.0
        x += _SPACE
    axes.set_xticks(centers, list(by_group))
    axes.set_xlim(-0.9, x - _SPACE - 0.1)
    axes.set_ylim(0, 1.16 * highest)
    for name, color in colors.items():
        axes.bar(0, 0, color=color, label=f"mst={name}")  # for the legend alone
    if {"measured", "predicted"} <= {row["how"] for row in rows}:
        axes.bar(0, 0, color=FAINT, hatch="///", edgecolor="white", label="hatched: predicted")
    if marker and any(row[marker] is not None for row in rows):
        axes.plot([], [], "D", markersize=5, color=INK, label="the paper's figure")


def draw_lines(axes: Axes, lines: Mapping[str, Sequence[tuple[float, float]]], colors: Mapping[str, Any]) -> None:
    """A line with a mark at each point for each name; names without points are left out."""
    for index, (name, points) in enumerate(lines.items()):
        if points:
            xs, ys = zip(*sorted(points), strict=True)
            marker = MARKERS[index % len(MARKERS)]
            axes.plot(xs, ys, marker=marker, markersize=4.5, lw=1.6, color=colors[name], label=name)


def from_zero(axes: Axes) -> None:
    """A vertical axis that begins at 0 and has room above."""
    axes.set_ylim(0, 1.1 * max(axes.dataLim.y1, 1e-12))


def length_ticks(axes: Axes, lengths: Sequence[float]) -> None:
    """A logarithmic axis of tokens, with these lengths."""
    number_ticks(axes, lengths, short_length)
    axes.set_xlabel("tokens", fontsize=8.5, color=INK)


def amount_ticks(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic vertical axis with a tick at 1, 2 and 5 of each decade that these values reach."""
    axes.set_yscale("log")
    if not values:
        return
    low, high = 0.8 * min(values), 1.25 * max(values)
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    shown = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes.set_ylim(low, high)
    axes.minorticks_off()


def whole_decades(axes: Axes) -> None:
    """A logarithmic vertical axis from one power of ten to another."""
    axes.set_yscale("log")
    low, high = axes.dataLim.minposy, axes.dataLim.y1
    axes.set_ylim(10.0 ** floor(log10(low)), 10.0 ** (floor(log10(high)) + 1))


def number_ticks(axes: Axes, values: Sequence[float], form: Callable[[float], str] = "{:g}".format) -> None:
    """Ticks at these values but where they would be too close; a logarithmic axis if they are far apart."""
    values = sorted(set(values))
    logarithmic = values[0] > 0 and values[-1] / values[0] > 4
    if logarithmic:
        axes.set_xscale("log")
    places = [log(value) for value in values] if logarithmic else values
    shown: list[float] = []
    last = float("-inf")
    for value, place in zip(values, places, strict=True):
        if place - last >= 0.06 * (places[-1] - places[0]):
            shown.append(value)
            last = place
    axes.set_xticks(shown, [form(value) for value in shown])
    axes.minorticks_off()


def finish(axes: Axes, title: str, *, legend: bool = False) -> None:
    """The title, and axes that step back behind what they show."""
    axes.set_title(title, fontsize=9.5, loc="left", color=INK)
    axes.tick_params(labelsize=8.5, colors=INK, length=2)
    axes.grid(axis="y", color="#e4e7eb", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    if legend:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)
