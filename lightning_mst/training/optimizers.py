"""Optimizers that are more than Lightning expects of one: they have hooks on the model's parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_mst.in_backward.optimizer import OptimizerInBackward
from lightning_mst.on_host.optimizer import OptimizerOnHost

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import DeepSpeedStrategy

__all__ = [
    "check_deepspeed_optimizer",
    "connect_optimizers",
    "free_gradients_in_backward",
    "release_optimizers",
    "states_are_on_host",
]


def connect_optimizers(trainer: Trainer) -> None:
    """Fits them to the Trainer; in ``on_fit_start``. Twice is as good as once.

    Args:
        trainer: after it has set up its strategy.

    Raises:
        MisconfigurationException: something that the Trainer does does not go with one of them.
    """
    for optimizer in trainer.strategy.optimizers:
        if isinstance(optimizer, OptimizerInBackward):
            optimizer.connect(trainer)
        elif isinstance(optimizer, OptimizerOnHost):
            optimizer.check_trainer(trainer)
        elif _steps_on_host(optimizer) and any(
            p.device.type != "cpu" for g in optimizer.param_groups for p in g["params"]
        ):
            raise MisconfigurationException(
                f"{type(optimizer).__name__} steps weights that DeepSpeed keeps in the host's memory, but under"
                f" {type(trainer.strategy).__name__} they are on a device. Set"
                " strategy='mst_deepspeed_stage_3_offload', or make another optimizer. On one device, OptimizerOnHost"
                " does the same."
            )


def release_optimizers(trainer: Trainer) -> None:
    """Takes their hooks off the parameters."""
    for optimizer in trainer.strategy.optimizers:
        if isinstance(optimizer, (OptimizerInBackward, OptimizerOnHost)):
            optimizer.remove()


def free_gradients_in_backward(trainer: Trainer) -> list[str]:
    """The classes of those that leave no gradients behind after a backward pass."""
    return [
        type(optimizer).__name__
        for optimizer in trainer.strategy.optimizers
        if isinstance(optimizer, OptimizerInBackward)
        or (isinstance(optimizer, OptimizerOnHost) and optimizer.offload_gradients)
    ]


def states_are_on_host(strategy: DeepSpeedStrategy) -> bool:
    """Whether DeepSpeed is to keep optimizer states, and step, in the host's memory."""
    offload = _zero_options(strategy).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def check_deepspeed_optimizer(strategy: DeepSpeedStrategy, optimizer: Any) -> None:
    """Makes sure that DeepSpeed's optimizers for the CPU, and states in the host's memory, come together.

    Raises:
        MisconfigurationException: the one is there without the other.
    """
    on_host, name = states_are_on_host(strategy), type(optimizer).__name__
    if on_host and not _steps_on_host(optimizer) and strategy.config.get("zero_force_ds_cpu_optimizer", True):
        raise MisconfigurationException(
            f"{type(strategy).__name__} with offload_optimizer steps in the host's memory, for which DeepSpeed has"
            f" optimizers of its own, but configure_optimizers made {name}. Make a deepspeed.ops.adam.DeepSpeedCPUAdam"
            " there (in our program, optimizer=deepspeed_cpu_adam), or set offload_optimizer=False."
        )
    if not on_host and _steps_on_host(optimizer):
        raise MisconfigurationException(
            f"{name} steps in the host's memory, but {type(strategy).__name__} keeps optimizer states on the device."
            " Set offload_optimizer=True (strategy='mst_deepspeed_stage_3_offload'), or make a torch.optim.AdamW."
        )


def _zero_options(strategy: DeepSpeedStrategy) -> dict[str, Any]:
    config = strategy.config
    return config.get("zero_optimization") or {} if isinstance(config, dict) else {}


def _steps_on_host(optimizer: Any) -> bool:
    """Whether it is one of DeepSpeed's for the CPU, without an import of DeepSpeed, which takes seconds."""
    return type(optimizer).__name__ in ("DeepSpeedCPUAdam", "DeepSpeedCPULion", "DeepSpeedCPUAdagrad")
