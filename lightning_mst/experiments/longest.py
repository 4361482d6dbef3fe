"""``task=longest``: the longest sequence whose training step fits a device."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from lightning_mst.experiments.fitting import Fitting, budget_of
from lightning_mst.experiments.search import largest
from lightning_mst.experiments.subject import read_subject
from lightning_mst.memory.longest import LONGEST, SHORTEST, longest
from lightning_mst.models import num_positions
from lightning_mst.units import GIB

__all__ = ["run"]

_SHARE = 100
"""Measured lengths are found to within one part in so many of the predicted one."""


def run(config: DictConfig) -> dict[str, Any]:
    """Find the longest sequence whose training step fits ``task.memory``.

    The planner says how long it may be. Where steps are measured, real ones confirm or correct that, to within 1 % of
    it.

    Args:
        config: As composed from ``conf/config.yaml`` with ``task=longest``.

    Returns:
        The run's labels (see ``Subject``), ``batch_size``, ``longest`` (tokens in each sequence, 0 if even a few do not
        fit), ``peak_gib`` (tensors at the peak of that step, or None), ``memory_gib`` and ``how``.

    Raises:
        ConfigurationError: Something in it can't be done.
    """
    subject = read_subject(config)
    fitting = Fitting(subject, budget_of(config.task.memory, subject))
    batch_size = subject.run.batch_size
    limit = min(LONGEST, num_positions(subject.setting.model) or LONGEST)
    found = longest(lambda length: subject.predict(batch_size, length).total, fitting.budget, limit=limit)
    if subject.how == "measured":
        found = largest(
            lambda length: length <= limit and fitting.fits(batch_size, length),
            start=found,
            grain=max(1, found // _SHARE),
            least=SHORTEST,
        )
    peak = fitting.peak(batch_size, found) if found else None
    return {
        **subject.labels,
        "batch_size": batch_size,
        "longest": found,
        "peak_gib": None if peak is None else peak / GIB,
        "memory_gib": fitting.budget / GIB,
        "how": subject.how,
    }
