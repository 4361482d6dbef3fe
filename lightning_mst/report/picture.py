"""The picture of a report. Needs matplotlib (``pip install 'lightning-mst[plots]'``)."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from lightning_mst.report.drawing import INK
from lightning_mst.report.view import Section

__all__ = ["draw_report"]

WIDTH, TITLE = 11.0, 0.45
"""Inches: of the picture, and the height of its title."""


def draw_report(title: str, sections: Sequence[Section]) -> Figure:
    """Draw sections below each other.

    Args:
        title: Above all.
        sections: With completed runs.
    """
    heights = [section.view.height for section in sections]
    # Without pyplot there is no window system to choose, and no global state to clean up.
    figure = Figure(figsize=(WIDTH, TITLE + sum(heights)), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold", color=INK)
    parts = figure.subfigures(len(sections), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, section in zip(parts, sections, strict=True):
        title = f"{section.title}: {section.made}"
        part.suptitle(title, x=0.01, ha="left", fontsize=10.5, color=INK)
        section.view.draw(part, section)
    return figure
