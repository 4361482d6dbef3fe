"""Running a training step once more as if it had not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric

__all__ = ["Snapshot", "without_side_effects"]


class Snapshot:
    """The buffers and metric states of a LightningModule at the moment of the call.

    Args:
        pl_module: the LightningModule.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in pl_module.buffers()]
        self._metrics = [
            (metric, metric._copy_state_dict(), metric._update_count, metric._computed)
            for metric in pl_module.modules()
            if isinstance(metric, Metric)
        ]

    def restore(self) -> None:
        """Puts them back, as often as wanted."""
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)
        for metric, state, count, computed in self._metrics:
            for name, value in state.items():
                # A copy: metrics add to their states in place.
                setattr(metric, name, value.clone() if isinstance(value, Tensor) else list(value))
            metric._update_count, metric._computed = count, computed


@contextmanager
def without_side_effects(pl_module: LightningModule) -> Iterator[None]:
    """Runs the body so that it leaves no logged values, metric states or changed buffers behind.

    Args:
        pl_module: the LightningModule.
    """
    before = Snapshot(pl_module)
    silent = {"log": lambda *_, **__: None, "log_dict": lambda *_, **__: None}
    shadowed = {name: pl_module.__dict__[name] for name in silent if name in pl_module.__dict__}
    pl_module.__dict__.update(silent)
    try:
        yield
    finally:
        for name in silent:
            del pl_module.__dict__[name]
        pl_module.__dict__.update(shadowed)
        before.restore()
