"""``checkpoint_layers="auto"`` in a Trainer: settled by the program's own training step, before the first one."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_mst.memory.auto_layers import Room, first_that_fits
from lightning_mst.ops.free_host_memory import free_host_memory
from lightning_mst.rewrite.config import MSTConfig
from lightning_mst.rewrite.handle import MSTHandle
from lightning_mst.training.predicted import CannotRehearse, RehearsedProgram
from lightning_mst.units import parse_bytes

__all__ = ["check_auto_layers", "settle_layers"]


def check_auto_layers(trainer: Trainer, config: MSTConfig) -> None:
    """Makes sure that the layers can be chosen.

    Raises:
        MisconfigurationException: there are several devices, or nobody said how much memory a CPU may use.
    """
    if config.checkpoint_layers != "auto":
        return
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise MisconfigurationException(
            "checkpoint_layers='auto' rehearses the training step of one device, but the strategy is "
            f"{type(trainer.strategy).__name__}. See what `lightning-mst plan` says of this strategy, and give a list "
            "of layers, a number or 'all'."
        )
    if config.device_memory is None and trainer.strategy.root_device.type == "cpu":
        raise MisconfigurationException(
            "checkpoint_layers='auto' needs to know how much memory a step may take: MSTCallback(device_memory='8GiB', "
            "...) or MSTConfig.for_memory('8GiB'). On an accelerator it is what the device has."
        )


def settle_layers(
    trainer: Trainer, pl_module: LightningModule, handle: MSTHandle, config: MSTConfig, batch: Any, batch_idx: int
) -> None:
    """Checkpoints as few layers as fit, and says how many; does more to the layers where that is not enough.

    Where the step can't be rehearsed, all are checkpointed, with a warning.

    Args:
        trainer: the Trainer.
        pl_module: the LightningModule.
        handle: of its rewrite.
        config: with ``checkpoint_layers="auto"``.
        batch: the first batch.
        batch_idx: its number.

    Raises:
        MisconfigurationException: nothing that could be done is enough.
    """
    room = Room(_memory_of(trainer.strategy.root_device, config), free_host_memory())
    longest = _lengthened(batch, config)
    try:
        program = RehearsedProgram(trainer, pl_module, longest, batch_idx)
    except CannotRehearse as reason:
        rank_zero_warn(f"checkpoint_layers='auto': all layers are checkpointed, because {reason}.")
        return
    settled = first_that_fits(config, program.predict_as, num_layers=len(handle.layers), room=room)
    if settled.config is None:
        raise MisconfigurationException(f"checkpoint_layers='auto': {settled.in_words()}")
    handle.update(settled.config)
    count = sum(row.form.startswith("checkpointed") for row in handle.rows)
    rank_zero_info(
        f"checkpoint_layers='auto': {count} of {len(handle.layers)} layers are checkpointed. {settled.in_words()}"
    )


def _memory_of(device: torch.device, config: MSTConfig) -> int:
    if config.device_memory is not None:
        return parse_bytes(config.device_memory)
    _, total = torch.get_device_module(device).mem_get_info(device)
    return int(total)


def _lengthened(batch: Any, config: MSTConfig) -> Any:
    """A batch with as many and as long sequences as the config says, made by repeating what it has."""
    if config.sequence_length is None:
        return batch
    tokens = next((t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim() == 2), None)
    if tokens is None:
        raise MisconfigurationException(
            "sequence_length is given for checkpoint_layers='auto', but no tensor of the batch has the shape (B, S). "
            "Leave it out, and let the first batch have the longest sequences."
        )
    rows, columns = tokens.shape
    row = torch.arange(config.batch_size, device=tokens.device) % rows
    column = torch.arange(config.sequence_length, device=tokens.device) % columns

    def repeated(entry: Any) -> Any:
        is_of_tokens = isinstance(entry, Tensor) and entry.shape[:2] == (rows, columns)
        return entry[row][:, column] if is_of_tokens else entry

    return tree_map(repeated, batch)
