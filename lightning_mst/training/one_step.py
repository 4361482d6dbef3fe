"""A LightningModule's training step, called outside of the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

__all__ = ["loss_of_training_step"]


def loss_of_training_step(pl_module: LightningModule, batch: Any, batch_idx: int, *, wanted_by: str) -> Tensor:
    """Runs ``training_step`` once.

    Args:
        pl_module: the LightningModule.
        batch: what it is given.
        batch_idx: the batch's number, if the step takes one.
        wanted_by: who needs the loss, for the error.

    Returns:
        The loss, ().

    Raises:
        MisconfigurationException: the step returns none.
    """
    arguments = [batch]
    if is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2):
        arguments.append(batch_idx)
    output = pl_module.training_step(*arguments)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"{wanted_by} needs a training_step that returns a loss; got {type(output).__name__}."
        )
    return loss
