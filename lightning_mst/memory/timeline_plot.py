"""The figure of a step's memory. Needs matplotlib (``pip install 'lightning-mst[plots]'``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lightning_mst.memory.timeline import GROUPS, Group, Timeline, Visit

__all__ = ["plot_timelines"]

INK, FAINT, PERSISTENT = "#1f2933", "#7b8794", "#cbd2d9"
COLORS: dict[Group, str] = {
    "embedding": "#3aa6a0",
    "norm": "#8fbf5f",
    "attention": "#2f6db3",
    "MLP": "#f0963c",
    "rest": "#9fb3c8",
    "LM head": "#c8385a",
    "loss": "#8e5ea2",
    "optimizer": "#52606d",
}
_LABELS = {"rest": "between blocks", "norm": "norms", "embedding": "embeddings", "optimizer": "optimizer step"}
_POINTS = 48  # of a visit; more are not seen


def plot_timelines(timelines: Sequence[Timeline], title: str, note: str, path: Path) -> None:
    """Draws one or two courses of a step side by side, on the same scale.

    A panel goes from block to block in the order of their work, each with the same width, as modelled work takes no
    time.

    Args:
        timelines: what to draw.
        title: above all.
        note: a line below.
        path: the PNG file to write.
    """
    highest = max(timeline.peak for timeline in timelines)
    unit, name = (2**30, "GiB") if highest >= 2**30 else (2**20, "MiB")
    # Without pyplot there is no window system to choose, and no global state to clean up.
    figure = Figure(figsize=(6.4 * len(timelines) + 0.6, 4.9), dpi=160, layout="constrained")
    panels = figure.subplots(1, len(timelines), sharey=True, squeeze=False)[0]
    for axes, timeline in zip(panels, timelines, strict=True):
        _draw(axes, timeline, unit)
        less = f", {highest / timeline.peak:.1f} times less" if timeline.peak < 0.95 * highest else ""
        axes.set_title(
            f"{timeline.form.capitalize()} ({timeline.source}): {timeline.peak / unit:,.2f} {name}{less}",
            loc="left", fontsize=11, color=INK, pad=24,
        )  # fmt: skip
    panels[0].set_ylim(0, highest / unit * 1.12)
    panels[0].set_ylabel(f"tensors alive ({name})", color=INK)
    shown = {visit.group for timeline in timelines for visit in timeline.visits}
    patches = [Patch(color=PERSISTENT, label="weights, optimizer states, batch")]
    patches += [Patch(color=COLORS[group], label=_LABELS.get(group, group)) for group in GROUPS if group in shown]
    legend = figure.legend(
        handles=patches, loc="outside lower left", ncols=9 if len(timelines) > 1 else 5, frameon=False, fontsize=8.5,
        labelcolor=INK, handlelength=1.1, columnspacing=1.4,
        title=fill(note, 95 * len(timelines)), title_fontsize=8.5, alignment="left",
    )  # fmt: skip
    legend.get_title().set_color(FAINT)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold", color=INK)
    figure.savefig(path)


def _draw(axes: Axes, timeline: Timeline, unit: int) -> None:
    widths = [_width(visit) for visit in timeline.visits]
    total = sum(widths)
    xs: dict[Group, list[float]] = {group: [] for group in GROUPS}
    ys: dict[Group, list[float]] = {group: [] for group in GROUPS}
    line_x: list[float] = []
    line_y: list[float] = []
    x, highest = 0.0, (0.0, 0.0)
    begins: dict[str, float] = {}
    for visit, width in zip(timeline.visits, widths, strict=True):
        width /= total
        begins.setdefault(visit.place.phase, x)
        if visit.place.phase == "backward":
            begins.pop("optimizer", None)  # a step inside of the backward pass is not the end of it
        values = [value / unit for value in _thinned(visit.live)]
        points = [(x + width * i / len(values), value) for i, value in enumerate(values)]
        points.append((x + width, values[-1]))
        line_x += [px for px, _ in points]
        line_y += [py for _, py in points]
        # nan: a gap to the next visit of the group.
        xs[visit.group] += [px for px, _ in points] + [x + width]
        ys[visit.group] += [py for _, py in points] + [float("nan")]
        highest = max(highest, *((py, px) for px, py in points))
        x += width
    base = timeline.persistent / unit
    for group in GROUPS:
        if xs[group]:
            low = [min(base, y) for y in ys[group]]
            axes.fill_between(xs[group], low, ys[group], step="post", color=COLORS[group], linewidth=0)
    axes.plot(line_x, line_y, drawstyle="steps-post", color=INK, linewidth=0.5, alpha=0.75)
    axes.fill_between([0, 1], 0, base, color=PERSISTENT, linewidth=0)
    _mark_phases(axes, begins)
    _mark_peak(axes, highest, str(timeline.place))
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.tick_params(colors=INK, labelsize=9, left=False)
    axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def _width(visit: Visit) -> float:
    if visit.place.phase == "optimizer":
        return 3.0 if len(visit.live) > _POINTS else 0.5
    return 1.0 if visit.place.block else 0.4


def _thinned(live: tuple[int, ...]) -> list[int]:
    """The highest values of short stretches, so that no peak is lost, and the last one."""
    if len(live) <= _POINTS:
        return list(live)
    size = -(-len(live) // _POINTS)
    return [max(live[i : i + size]) for i in range(0, len(live), size)] + [live[-1]]


def _mark_phases(axes: Axes, begins: dict[str, float]) -> None:
    ends = [*list(begins.values())[1:], 1.0]
    for (phase, begin), end in zip(begins.items(), ends, strict=True):
        if begin:
            axes.axvline(begin, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=2)
        narrow = end - begin < 0.09
        axes.text(
            1.0 if narrow else (begin + end) / 2, 1.015, phase, ha="right" if narrow else "center", va="bottom",
            fontsize=9, color=FAINT, transform=axes.get_xaxis_transform(),
        )  # fmt: skip


def _mark_peak(axes: Axes, highest: tuple[float, float], where: str) -> None:
    y, x = highest
    axes.plot([x], [y], marker="o", markersize=4, color=INK, clip_on=False, zorder=5)
    left = x < 0.5
    axes.annotate(
        f"peak: {where}", (x, y), xytext=(9 if left else -9, 4), textcoords="offset points",
        ha="left" if left else "right", va="bottom", fontsize=8.5, color=INK, zorder=4,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0},
    )  # fmt: skip
