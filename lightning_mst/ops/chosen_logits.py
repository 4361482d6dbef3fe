"""A few chosen logits of each token, as dot products with single rows of the head's weight.

``linear(hidden, weight, bias).gather(-1, index)`` for index (tokens, k) costs tokens * V * D multiply-adds where
tokens * k * D are enough. The rows of the weight are read chunk by chunk, again in the backward pass, so what this
holds beyond its inputs is O(chunk_tokens * k * D), and in the backward pass the weight's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mst.ops.context import AutocastState, first_order_only
from lightning_mst.ops.head_chunks import HALF
from lightning_mst.ops.rehearsal import walk


def chosen_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, bounds: list[tuple[int, int]]
) -> Tensor:
    """The logits of a linear head at given places of the vocabulary.

    Args:
        hidden: (tokens, D).
        weight: (V, D).
        bias: (V,) or ``None``.
        index: (tokens, k), int64 in [0, V).
        bounds: (start, stop) of each chunk of tokens.

    Returns:
        (tokens, k), in the dtype that the linear layer would give under the present autocast state.

    Raises:
        IndexError: for an index out of range.
    """
    return _ChosenLogits.apply(AutocastState.now(hidden.device), bounds, index, hidden, weight, bias)


class _ChosenLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        autocast: AutocastState,
        bounds: list[tuple[int, int]],
        index: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.autocast, ctx.bounds = autocast, bounds
        ctx.save_for_backward(index, hidden, weight, bias)
        result = autocast.cast(hidden.new_empty(0)).new_empty(index.shape)
        with autocast.disabled():
            for start, stop in walk(bounds):
                at = index[start:stop]  # (chunk, k)
                rows = autocast.cast(F.embedding(at, weight))  # (chunk, k, D)
                column = autocast.cast(hidden[start:stop]).unsqueeze(2)  # (chunk, D, 1)
                if bias is None:
                    part = torch.bmm(rows, column)
                else:
                    part = torch.baddbmm(autocast.cast(bias[at]).unsqueeze(2), rows, column)
                result[start:stop] = part.squeeze(2)
        return result

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, hidden, weight, bias = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[3:]

        def zeros(tensor: Tensor) -> Tensor:
            return torch.zeros_like(tensor, dtype=torch.float32 if tensor.dtype in HALF else tensor.dtype)

        hidden_grad = torch.empty_like(hidden) if need_hidden else None
        weight_grad = zeros(weight) if need_weight else None
        bias_grad = zeros(bias) if need_bias else None
        with ctx.autocast.disabled():
            for start, stop in walk(ctx.bounds):
                at, out = index[start:stop], grad[start:stop]  # (chunk, k)
                if hidden_grad is not None:
                    rows = ctx.autocast.cast(F.embedding(at, weight))  # (chunk, k, D)
                    hidden_grad[start:stop] = torch.bmm(out.unsqueeze(1), rows).squeeze(1)
                if weight_grad is not None:
                    wide = weight_grad.dtype
                    outer = out.to(wide).unsqueeze(2) * hidden[start:stop].to(wide).unsqueeze(1)  # (chunk, k, D)
                    weight_grad.index_add_(0, at.reshape(-1), outer.flatten(0, 1))
                if bias_grad is not None:
                    bias_grad.index_add_(0, at.reshape(-1), out.reshape(-1).to(bias_grad.dtype))
        grads = ((hidden_grad, hidden), (weight_grad, weight), (bias_grad, bias))
        return (None, None, None, *(None if g is None else g.to(t.dtype) for g, t in grads))
