"""The contestants: the unmodified block or loss, per-chunk checkpointing, torch's own chunked head, and ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_mst.ops import LinearHead, linear_cross_entropy, token_wise
from lightning_mst.ops.chunking import lm_head_split, mlp_num_chunks
from lightning_mst.ops.deferred_logits import defer_logits
from lightning_mst.rewrite.costs import head_cost, mlp_cost


class GatedMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def auto_split(hidden: Tensor, weight: Tensor) -> dict[str, int]:
    """How a head of hidden (S, D) and weight (V, D) is split by itself."""
    vocab_size, hidden_size = weight.shape
    cost = head_cost([weight], vocab_size, weight.dtype)
    tokens = len(hidden)
    return lm_head_split("auto", hidden_size=hidden_size, vocab_size=vocab_size, num_tokens=tokens, cost=cost)


def lm_heads(hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Mean cross-entropy of an LM head: hidden (S, D), weight (V, D), labels (S,)."""
    split = auto_split(hidden, weight)
    size = split["chunk_tokens"]

    def unmodified() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), labels)

    def checkpointed() -> Tensor:
        def chunk_loss(h: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(h, weight), y, reduction="sum")

        parts = zip(hidden.split(size), labels.split(size), strict=True)
        return sum(checkpoint(chunk_loss, h, y, use_reentrant=False) for h, y in parts) / labels.numel()

    steps = {
        "unmodified": unmodified,
        "per-chunk checkpoint": checkpointed,
        "ours": lambda: linear_cross_entropy(hidden, weight, labels, **split),
    }
    options = getattr(nn, "LinearCrossEntropyOptions", None)
    if options is not None:
        steps["torch chunked"] = lambda: F.linear_cross_entropy(hidden, weight, labels, options=options())
    return steps


def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """As preference losses take them: logits (n, V), labels (n,)."""
    return F.log_softmax(logits, dim=-1).gather(-1, labels.unsqueeze(-1)).mean()


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """The divergence from a teacher, averaged over tokens: logits (n, V) of both."""
    return F.kl_div(F.log_softmax(student, dim=-1), F.softmax(teacher, dim=-1), reduction="batchmean")


def losses(
    loss: Callable[..., Tensor], heads: list[tuple[Tensor, Tensor]], *others: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """A loss on the logits of heads, each hidden (S, D) and weight (V, D), and on rows of others, averaged over S."""
    hiddens, weights = zip(*heads, strict=True)
    split = auto_split(hiddens[0], weights[0])

    def unmodified(*rows: Tensor) -> Tensor:
        return loss(*map(F.linear, rows, weights), *rows[len(weights) :])

    def checkpointed() -> Tensor:
        parts = zip(*(rows.split(split["chunk_tokens"]) for rows in (*hiddens, *others)), strict=True)
        means = [checkpoint(unmodified, *rows, use_reentrant=False) * len(rows[0]) for rows in parts]
        return sum(means) / len(hiddens[0])

    def ours() -> Tensor:
        return loss(*(defer_logits(hidden, LinearHead(weight), split=split) for hidden, weight in heads), *others)

    return {
        "unmodified": lambda: unmodified(*hiddens, *others),
        "per-chunk checkpoint": checkpointed,
        "ours": ours,
    }


def mlps(x: Tensor, mlp: nn.Module, *, in_layer: bool) -> dict[str, Callable[[], Tensor]]:
    """A gated MLP on x (1, S, D), alone or with its residual in a checkpointed layer."""
    cost = mlp_cost(mlp, x.shape[2])
    num_chunks = mlp_num_chunks("auto", num_tokens=x.shape[1], hidden_size=x.shape[2], cost=cost)

    def chunked(block: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda h: torch.cat([checkpoint(block, c, use_reentrant=False) for c in h.chunk(num_chunks, 1)], 1)

    blocks = {
        "unmodified": mlp,
        "per-chunk checkpoint": chunked(mlp),
        "ours": lambda h: token_wise(mlp, h, num_chunks=num_chunks),
    }

    def step(block: Callable[[Tensor], Tensor], recompute: bool) -> Callable[[], Tensor]:
        if not in_layer:
            return lambda: block(x).sum()
        layer = lambda h: h + block(h)  # noqa: E731
        if not recompute:
            return lambda: layer(x).sum()
        return lambda: checkpoint(layer, x, use_reentrant=False).sum()

    steps = {name: step(block, True) for name, block in blocks.items()}
    if in_layer:
        steps = {"no checkpointing": step(mlp, False)} | steps
    return steps
