"""Liger-Kernel: fused linear cross-entropy, tiled MLP, and its patch of a Llama."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from benchmarks.measure import Step
from benchmarks.peers import require


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Step:
    require("liger_kernel", hidden.device, needs_gpu=True)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss()

    def step() -> Tensor:
        loss = fused(weight, hidden, labels)
        loss.backward()
        return loss.detach()

    return step


def tiled_mlp(mlp: nn.Module, x: Tensor, num_chunks: int) -> Callable[[Tensor], Tensor]:
    """The MLP in tiles; the tiling is plain PyTorch, but importing it needs triton."""
    require("liger_kernel", x.device)
    from liger_kernel.ops.tiled_mlp import apply_tiled_mlp

    def forward(module: nn.Module, tile: Tensor) -> Tensor:
        return module.forward(tile)

    return lambda h: apply_tiled_mlp(forward, mlp, h, num_shards=num_chunks)


def patch_llama(model: nn.Module, ids: Tensor) -> None:
    require("liger_kernel", ids.device, needs_gpu=True)
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    # Its rotary embedding would replace the function of every Llama in the process, the other contestants' too.
    apply_liger_kernel_to_llama(rope=False, model=model)
