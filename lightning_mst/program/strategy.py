"""From the ``strategy`` group to Lightning's strategy."""

from __future__ import annotations

import difflib

import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.strategies import FSDPStrategy, Strategy, StrategyRegistry
from omegaconf import DictConfig

from lightning_mst.program.errors import ConfigurationError
from lightning_mst.strategies import MSTFSDPStrategy

__all__ = ["build_strategy", "check_strategy", "strategy_name"]


def build_strategy(choice: DictConfig | str | None) -> Strategy | str:
    """What ``Trainer(strategy=...)`` takes.

    Args:
        choice: A node with ``_target_``, the dotted path of a class, a name of Lightning's registry, or nothing for
            Lightning's choice.

    Raises:
        ConfigurationError: There is no strategy of this name.
    """
    if not choice:
        return "auto"
    if not isinstance(choice, str):
        return instantiate(choice, _convert_="all")
    if "." in choice:
        return instantiate({"_target_": choice})
    names = ["auto", *StrategyRegistry.available_strategies()]
    if choice.lower() not in names:
        close = difflib.get_close_matches(choice.lower(), names, n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ConfigurationError(
            f"trainer.strategy: There is no strategy {choice!r}.{hint} strategy=NAME takes a file of the group"
            f" (see --help), trainer.strategy=NAME a dotted path or one of {', '.join(sorted(names))}"
        )
    return choice


def strategy_name(choice: DictConfig | str | None) -> str:
    """What a strategy is called in tables: the file's name, the registered name, or the path of the class."""
    if isinstance(choice, str):
        return choice
    if HydraConfig.initialized():
        return str(HydraConfig.get().runtime.choices.get("strategy"))
    return choice["_target_"] if choice else "auto"


def check_strategy(trainer: pl.Trainer) -> None:
    """Find what a strategy can't do before any work, where Lightning would find it after a step or not at all.

    Raises:
        ConfigurationError: FSDP1 is to train on CPUs, or to clip gradients in a way that it can't.
    """
    if not isinstance(trainer.strategy, FSDPStrategy):
        return
    if trainer.strategy.root_device.type == "cpu":
        raise ConfigurationError(
            "strategy: FSDP1 trains on GPUs only. On CPUs, use strategy=mst_model_parallel (FSDP2)"
        )
    by_norm = bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm in (None, "norm")
    if by_norm and not isinstance(trainer.strategy, MSTFSDPStrategy):
        raise ConfigurationError(
            f"trainer.gradient_clip_val: Lightning's FSDP can't clip gradients by their norm, got"
            f" {trainer.gradient_clip_val}. Set strategy=mst_fsdp, which can, or trainer.gradient_clip_val=null"
        )
