"""One file for each kind of experiment; to add one, write its file and list it here."""

from lightning_mst.report.view import View
from lightning_mst.report.views import (
    blocks,
    breakdown,
    convergence,
    long_context,
    max_length,
    sweep,
    throughput,
    timeline,
)

__all__ = ["VIEWS"]

VIEWS: tuple[View, ...] = (
    max_length.VIEW,
    throughput.VIEW,
    blocks.VIEW,
    breakdown.VIEW,
    timeline.VIEW,
    convergence.VIEW,
    long_context.VIEW,
    sweep.VIEW,
)
"""In the order of a report. A run goes to the first that claims it; the last one takes all."""
