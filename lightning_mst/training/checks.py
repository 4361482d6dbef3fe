"""What does not go together, found before a step is spent."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins import TransformerEnginePrecision
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from lightning_mst.rewrite.config import MSTConfig
from lightning_mst.training.sharding import check_still_tied

__all__ = ["check_model", "check_trainer"]


def check_trainer(trainer: Any, config: MSTConfig) -> None:
    """Looks at the Trainer and its strategy.

    Args:
        trainer: the Trainer.
        config: the callback's settings.

    Raises:
        TypeError: the Trainer is that of the package ``pytorch_lightning``.
        MisconfigurationException: anything else that can't work.
    """
    if not isinstance(trainer, pl.Trainer):
        raise TypeError(
            f"MSTCallback is a callback of lightning.pytorch, but the Trainer is {type(trainer).__module__}."
            f"{type(trainer).__name__}. The two packages don't mix: write `from lightning.pytorch import Trainer`, and"
            " take LightningModule and callbacks from there, too."
        )
    from lightning_mst.callback import MSTCallback

    callbacks = [callback for callback in trainer.callbacks if isinstance(callback, MSTCallback)]
    if len(callbacks) > 1:
        raise MisconfigurationException(f"The Trainer has {len(callbacks)} MSTCallbacks. Keep one of them.")
    settings = getattr(trainer.strategy, "mst", None)
    if isinstance(settings, MSTConfig) and settings != config:
        raise MisconfigurationException(
            f"The strategy and the MSTCallback have different settings: {settings} and {config}. Give them to one"
            " of the two; the other takes them over."
        )
    if isinstance(trainer.precision_plugin, TransformerEnginePrecision):
        raise MisconfigurationException(
            "precision='transformer-engine' replaces linear layers by others that keep state from call to call, and was"
            " not tested with mini-sequences. Use 'bf16-mixed' or 'bf16-true'."
        )
    policy = isinstance(trainer.strategy, FSDPStrategy) and trainer.strategy._activation_checkpointing_kwargs
    if policy and config.checkpoint_layers != "none":
        raise MisconfigurationException(_twice("the strategy's activation_checkpointing_policy", config))


def check_model(model: nn.Module, config: MSTConfig) -> None:
    """Looks at the model as ``configure_model`` left it.

    Args:
        model: the LightningModule.
        config: the settings.

    Raises:
        MisconfigurationException: its layers are checkpointed already, or sharding broke the tie of two weights.
    """
    wrapper = next((name for name, module in model.named_modules() if isinstance(module, CheckpointWrapper)), None)
    if wrapper is not None and config.checkpoint_layers != "none":
        raise MisconfigurationException(_twice(f"the CheckpointWrapper around {wrapper}", config))
    check_still_tied(model)


def _twice(other: str, config: MSTConfig) -> str:
    return (
        f"Activation checkpointing is switched on twice, by {other} and by checkpoint_layers="
        f"{config.checkpoint_layers!r}, so that each layer would be computed three times. Keep one: drop the first, or"
        " set checkpoint_layers='none'."
    )
