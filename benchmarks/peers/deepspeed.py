"""DeepSpeed's ALST: tiled fused logits and loss, tiled MLP, and both in a Llama."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Step
from benchmarks.peers import require


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, num_chunks: int) -> Step:
    loss_of = _tiled_loss(weight, hidden, num_chunks)

    def step() -> Tensor:
        loss = loss_of(hidden.unsqueeze(0), labels.unsqueeze(0))
        loss.backward()
        return loss.detach()

    return step


def _tiled_loss(weight: Tensor, hidden: Tensor, num_chunks: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean cross-entropy of hidden (1, S, D) and labels (1, S)."""
    require("deepspeed", hidden.device)
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    def loss_of(hidden: Tensor, labels: Tensor) -> Tensor:
        # A tile's share of the mean over all tokens: its own "mean" is one of tiles, which may differ in length. The
        # division can't come later, as the weight's gradient does not see what comes after.
        def tile(_: object, h: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(h, weight), y, reduction="sum") / labels.numel()

        return TiledFusedLogitsLoss.apply(tile, None, hidden, labels, None, num_chunks, [weight], "sum")

    return loss_of


def tiled_mlp(mlp: nn.Module, x: Tensor, num_chunks: int) -> Callable[[Tensor], Tensor]:
    require("deepspeed", x.device)
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    # Of the class, because the module's own is replaced where a whole model is patched.
    forward = type(mlp).forward
    weights = list(mlp.parameters())
    return lambda h: TiledMLP.apply(forward, mlp, h, num_chunks, weights)


def patch_llama(model: nn.Module, ids: Tensor, *, mlp_chunks: int, head_chunks: int) -> None:
    """Both in a Llama of transformers."""
    for layer in model.model.layers:
        layer.mlp.forward = tiled_mlp(layer.mlp, ids, mlp_chunks)
    model.forward = partial(_forward, model, _tiled_loss(model.lm_head.weight, ids, head_chunks))


def _forward(
    model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], input_ids: Tensor, labels: Tensor, use_cache: bool
) -> SimpleNamespace:
    hidden = model.model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
    return SimpleNamespace(loss=loss_of(hidden[:, :-1], labels[:, 1:]))
