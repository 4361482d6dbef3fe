"""What splitting a block would save and cost, measured on the block itself, without values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_mst.ops.chunking import BlockCost
from lightning_mst.rewrite.shapes import true_shape
from lightning_mst.rewrite.stand_in import stand_in

_TOKENS = 8


def mlp_cost(mlp: nn.Module, width: int) -> BlockCost | None:
    """The cost of an MLP, or ``None`` for one that needs values to run, as experts do.

    Args:
        mlp: a function of one tensor (..., D).
        width: D.
    """
    twin = stand_in(mlp, "meta")
    for copied, own in zip(twin.parameters(), mlp.parameters(), strict=True):
        if copied.is_floating_point():
            copied.requires_grad_(own.requires_grad)
    dtype = next((p.dtype for p in twin.parameters() if p.is_floating_point()), torch.get_default_dtype())
    x = torch.empty(1, _TOKENS, width, dtype=dtype, device="meta", requires_grad=True)
    kept = _Kept([x, *twin.parameters()])
    try:
        with torch.enable_grad(), saved_tensors_hooks(kept.note, lambda tensor: tensor):
            twin(x)
    except Exception:  # whatever a stranger's forward raises without values: the number of tokens decides alone then
        return None
    return BlockCost(kept.size // _TOKENS, _split_of(list(mlp.parameters())))


def head_cost(parameters: Iterable[Tensor], vocab_size: int, dtype: torch.dtype) -> BlockCost:
    """The cost of an LM head: its logits, which are its gradient's place as well.

    Args:
        parameters: of the head.
        vocab_size: V.
        dtype: of the logits.
    """
    # A wide weight's gradient is its own sum.
    half = [p for p in parameters if p.element_size() < 4]
    return BlockCost(vocab_size * dtype.itemsize, sums_of(half) if torch.is_grad_enabled() else 0)


def sums_of(parameters: Iterable[Tensor]) -> int:
    """Bytes of the fp32 sums (fp64 ones for fp64) of the trained weights' gradients."""
    return sum(true_shape(p).numel() * max(4, p.element_size()) for p in parameters if p.requires_grad)


def _split_of(parameters: list[nn.Parameter]) -> int:
    """Bytes beyond the trained weights' gradients: of their sums, and of one chunk's gradient of one weight."""
    own = [true_shape(p).numel() * p.element_size() for p in parameters if p.requires_grad]
    return sums_of(parameters) + max(own, default=0) - sum(own)


class _Kept:
    """Adds up the storages that a graph keeps, apart from those that are there anyway."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._seen: dict[int, Any] = {t.untyped_storage()._cdata: t.untyped_storage() for t in known}
        self.size = 0

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage
            self.size += storage.nbytes()
        return tensor
