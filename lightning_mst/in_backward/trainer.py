"""The optimizers of a Trainer that step in the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_mst.in_backward.optimizer import OptimizerInBackward

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def optimizers_in_backward(trainer: Trainer) -> list[OptimizerInBackward]:
    """Those of the Trainer's optimizers that do."""
    return [optimizer for optimizer in trainer.strategy.optimizers if isinstance(optimizer, OptimizerInBackward)]


def connect_optimizers(trainer: Trainer) -> None:
    """Lets them step behind the reduction of gradients; in ``on_fit_start``. Twice is as good as once.

    Args:
        trainer: after it has set up its strategy.

    Raises:
        MisconfigurationException: the Trainer needs all gradients at a time.
    """
    for optimizer in optimizers_in_backward(trainer):
        optimizer.connect(trainer)
