"""An LM head whose weight is split over a tensor-parallel group (``ColwiseParallel`` and the like)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mst.ops.context import AutocastState
from lightning_mst.ops.deferred_tensor import Local
from lightning_mst.ops.heads import ModuleHead


class LocalAnswer(Local, tuple):
    """Whole tensors, for tensor parallelism's hooks to leave alone."""

    def to_local(self) -> tuple[Any, ...]:
        """A plain tuple."""
        return tuple(self)


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a group of ranks, as the input of a tensor-parallel module does."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole_head(module: nn.Module, forward: Callable[..., Any], hidden: Any) -> tuple[Tensor, ModuleHead]:
    """The head as a function of plain tensors that gives whole logits on every rank.

    Each chunk's logits are gathered from the group, and the gradients of its hidden states added up over it: as many
    bytes are sent as without chunks.

    Args:
        module: the head.
        forward: what it computes, from and to a ``DTensor``.
        hidden: a ``DTensor`` (..., D).

    Returns:
        The hidden states as a plain tensor, and the head.
    """
    from torch.distributed.tensor import DTensor, Replicate

    mesh = hidden.device_mesh
    everywhere = [Replicate()] * mesh.ndim

    def whole(rows: Tensor) -> Tensor:
        logits = forward(DTensor.from_local(rows, mesh, everywhere, run_check=False))
        return logits.redistribute(placements=everywhere).to_local() if isinstance(logits, DTensor) else logits

    local = hidden.redistribute(placements=everywhere).to_local()
    dtype = AutocastState.now(local.device).cast(local.new_empty(0)).dtype
    (vocab_size,) = {parameter.shape[0] for parameter in module.parameters()}
    return local, ModuleHead(whole, tuple(module.parameters()), vocab_size, dtype)
