"""The LM head with its loss: unmodified, in chunks of several makes, and as bare matmuls, which is the floor."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.contest import UNMODIFIED, Contest, Values
from benchmarks.measure import Step
from benchmarks.peers import apple, deepspeed, liger, torch_chunked
from benchmarks.sizes import Sizes
from lightning_mst.ops import linear_cross_entropy
from lightning_mst.ops.chunking import lm_head_split, resolve_num_chunks
from lightning_mst.rewrite.costs import head_cost

_REFERENCE_TOKENS = 1024


def random_head(sizes: Sizes, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (S, D) and a weight (V, D) that want gradients, and labels (S,)."""
    hidden = torch.randn(length, sizes.hidden, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(sizes.vocabulary, sizes.hidden, device=device, dtype=dtype) / sizes.hidden**0.5
    return hidden, weight.requires_grad_(), torch.randint(sizes.vocabulary, (length,), device=device)


def auto_chunk_tokens(hidden: Tensor, weight: Tensor) -> int:
    """How many tokens a chunk has when a head of hidden (S, D) and weight (V, D) is split by itself."""
    vocab_size, hidden_size = weight.shape
    cost = head_cost([weight], vocab_size, weight.dtype)
    split = lm_head_split("auto", hidden_size=hidden_size, vocab_size=vocab_size, num_tokens=len(hidden), cost=cost)
    chosen = {"num_chunks": None, "chunk_tokens": None} | split
    return -(-len(hidden) // resolve_num_chunks(len(hidden), **chosen))


def contest(sizes: Sizes, length: int, dtype: torch.dtype, device: torch.device) -> list[Contest]:
    """All contestants; those that take a chunk size get that of ours."""
    hidden, weight, labels = random_head(sizes, length, dtype, device)
    size = auto_chunk_tokens(hidden, weight)
    num_chunks = -(-length // size)

    def plain(h: Tensor, y: Tensor, w: Tensor = weight) -> Tensor:
        return F.cross_entropy(F.linear(h, w), y, reduction="sum") / length

    def checkpointed() -> Tensor:
        parts = zip(hidden.split(size), labels.split(size), strict=True)
        return sum(checkpoint(plain, h, y, use_reentrant=False) for h, y in parts)

    def reference() -> Values:
        wide = weight.detach().double().requires_grad_()
        rows = hidden.detach().double().requires_grad_()
        loss = torch.zeros((), dtype=torch.float64, device=device)
        # Token by token the unmodified block; in pieces, because all of its fp64 logits may not fit.
        for h, y in zip(rows.split(_REFERENCE_TOKENS), labels.split(_REFERENCE_TOKENS), strict=True):
            part = plain(h, y, wide)
            part.backward()
            loss += part.detach()
        return {"loss": [loss], "dX": [rows.grad], "dW": [wide.grad]}

    return [
        Contest(
            block="LM head",
            length=length,
            leaves=[hidden, weight],
            forward_multiply_adds=length * weight.numel(),
            contestants={
                UNMODIFIED: lambda: _step(lambda: F.cross_entropy(F.linear(hidden, weight), labels)),
                "per-chunk checkpoint": lambda: _step(checkpointed),
                "ours": lambda: _step(lambda: linear_cross_entropy(hidden, weight, labels, chunk_tokens=size)),
                "three bare matmuls, whole": lambda: bare_matmuls(hidden, weight, length),
                "three bare matmuls, chunks": lambda: bare_matmuls(hidden, weight, size),
            },
            peers={
                "torch chunked": lambda: torch_chunked.linear_cross_entropy(hidden, weight, labels),
                "torch chunked, our chunks": lambda: torch_chunked.linear_cross_entropy(
                    hidden, weight, labels, chunk_tokens=size
                ),
                "DeepSpeed": lambda: deepspeed.linear_cross_entropy(hidden, weight, labels, num_chunks),
                "Liger": lambda: liger.linear_cross_entropy(hidden, weight, labels),
                "Apple": lambda: apple.linear_cross_entropy(hidden, weight, labels),
            },
            values=lambda loss: {"loss": [loss], "dX": [hidden.grad], "dW": [weight.grad]},
            expected=reference,
        )
    ]


def _step(loss_of: Callable[[], Tensor]) -> Step:
    def step() -> Tensor:
        loss = loss_of()
        loss.backward()
        return loss.detach()

    return step


def bare_matmuls(hidden: Tensor, weight: Tensor, chunk_tokens: int) -> Step:
    """h @ W^T, dlogits @ W and dlogits^T @ h, chunk by chunk in buffers that stay, with nothing between them."""
    h, w = hidden.detach(), weight.detach()

    def step() -> None:
        buffer = h.new_empty(min(chunk_tokens, len(h)), len(w))
        hidden_grad, weight_grad = torch.empty_like(h), torch.zeros_like(w)
        for rows, into in zip(h.split(chunk_tokens), hidden_grad.split(chunk_tokens), strict=True):
            logits = buffer[: len(rows)]
            torch.mm(rows, w.t(), out=logits)
            torch.mm(logits, w, out=into)
            weight_grad.addmm_(logits.t(), rows)

    return step
