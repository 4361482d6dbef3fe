"""Optimizers with states in the host's memory, and the strategies that they go with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy

from lightning_mst.in_backward import OptimizerInBackward
from lightning_mst.on_host import OptimizerOnHost, deepspeed_cpu_adam
from lightning_mst.on_host.checks import problems_of_trainer
from lightning_mst.program.errors import ConfigurationError
from lightning_mst.training.optimizers import states_are_on_host

__all__ = ["check_optimizer", "check_planned_optimizer"]

Make = Callable[..., Any]


def check_optimizer(optimizer: Make, trainer: pl.Trainer) -> None:
    """Find what an optimizer does not go with before any work.

    Args:
        optimizer: Parameters -> optimizer, as the configuration says.
        trainer: Before it has set up anything.

    Raises:
        ConfigurationError: The strategy, device, precision or accumulation does not go with an optimizer on the host.
    """
    strategy = trainer.strategy
    if _maker(optimizer) is OptimizerOnHost:
        problems = problems_of_trainer(trainer, offload_gradients=_frees_gradients(optimizer))
        if strategy.root_device.type == "cpu":
            problems.append("a CPU (use optimizer=adamw, which is on the host there)")
        if problems:
            raise ConfigurationError(f"optimizer: One on the host does not go with {'; '.join(problems)}")
    _check_deepspeed(optimizer, isinstance(strategy, DeepSpeedStrategy) and states_are_on_host(strategy))


def check_planned_optimizer(optimizer: Make, strategy: str, accumulate_grad_batches: int, device: str) -> None:
    """The same of a plan.

    Args:
        optimizer: Parameters -> optimizer, as the configuration says.
        strategy: The planner's name of it.
        accumulate_grad_batches: Batches for one step of the optimizer.
        device: ``"cuda"`` or ``"cpu"``.

    Raises:
        ConfigurationError: It does not go with one of these.
    """
    on_host = _maker(optimizer) is OptimizerOnHost
    if on_host and (strategy != "single" or device == "cpu"):
        raise ConfigurationError(
            f"optimizer: One on the host works for one GPU, got {'a CPU' if device == 'cpu' else strategy}. On several,"
            " choose strategy=mst_deepspeed_stage_3_offload optimizer=deepspeed_cpu_adam; on a CPU, optimizer=adamw"
        )
    if accumulate_grad_batches > 1 and (_maker(optimizer) is OptimizerInBackward or _frees_gradients(optimizer)):
        other = "set optimizer.offload_gradients=false" if on_host else "choose another optimizer (optimizer=adamw)"
        raise ConfigurationError(
            "optimizer: One that takes them out of the backward pass cannot accumulate gradients, got"
            f" trainer.accumulate_grad_batches={accumulate_grad_batches}. Set it to 1, or {other}"
        )
    _check_deepspeed(optimizer, strategy == "zero3_offload")


def _check_deepspeed(optimizer: Make, states_on_host: bool) -> None:
    """Makes sure that DeepSpeed's CPU Adam and a strategy with states on the host come together."""
    if (_maker(optimizer) is deepspeed_cpu_adam) != states_on_host:
        missing, instead = (
            ("optimizer=deepspeed_cpu_adam", "strategy=mst_deepspeed_stage_3")
            if states_on_host
            else ("strategy=mst_deepspeed_stage_3_offload", "optimizer=adamw, or adamw_cpu_offload on one GPU")
        )
        raise ConfigurationError(
            "optimizer: DeepSpeed's CPU Adam and a DeepSpeed strategy with optimizer states on the host need each"
            f" other. Add {missing}, or choose {instead}"
        )


def _maker(optimizer: Make) -> Any:
    return getattr(optimizer, "func", optimizer)


def _frees_gradients(optimizer: Make) -> bool:
    """Whether it is one on the host that does."""
    return _maker(optimizer) is OptimizerOnHost and getattr(optimizer, "keywords", {}).get("offload_gradients", True)
