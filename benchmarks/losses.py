"""Losses on deferred logits: unmodified, per-chunk checkpoint, ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.contest import UNMODIFIED, Contest, Values
from benchmarks.heads import auto_chunk_tokens, random_head
from benchmarks.measure import Step
from benchmarks.sizes import Sizes
from lightning_mst.ops import LinearHead
from lightning_mst.ops.deferred_logits import defer_logits

_REFERENCE_TOKENS = 512
Loss = Callable[..., Tensor]


def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """As preference losses take them: logits (n, V), labels (n,)."""
    return F.log_softmax(logits, dim=-1).gather(-1, labels.unsqueeze(-1)).mean()


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """The divergence from a teacher, averaged over tokens: logits (n, V) of both."""
    return F.kl_div(F.log_softmax(student, dim=-1), F.softmax(teacher, dim=-1), reduction="batchmean")


def contest(sizes: Sizes, length: int, dtype: torch.dtype, device: torch.device) -> list[Contest]:
    hidden, weight, labels = random_head(sizes, length, dtype, device)
    teacher = tuple(tensor.detach() for tensor in random_head(sizes, length, dtype, device)[:2])
    return [
        _contest("Per-token log-probabilities", log_probabilities, [(hidden, weight)], labels),
        _contest("Distillation", distillation, [(hidden, weight), teacher]),
    ]


def _contest(block: str, loss: Loss, heads: list[tuple[Tensor, Tensor]], *others: Tensor) -> Contest:
    """A loss on the logits of heads, each hidden (S, D) and weight (V, D), and on rows of others, averaged over S."""
    hiddens, weights = zip(*heads, strict=True)
    hidden, weight = heads[0]
    length, size = len(hidden), auto_chunk_tokens(hidden, weight)

    def plain(*rows: Tensor) -> Tensor:
        return loss(*map(F.linear, rows, weights), *rows[len(weights) :])

    def checkpointed() -> Tensor:
        parts = zip(*(rows.split(size) for rows in (*hiddens, *others)), strict=True)
        return sum(checkpoint(plain, *rows, use_reentrant=False) * len(rows[0]) for rows in parts) / length

    def ours() -> Tensor:
        split = {"chunk_tokens": size}
        return loss(*(defer_logits(rows, LinearHead(head), split=split) for rows, head in heads), *others)

    def reference() -> Values:
        leaves = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
        rows = [leaves[0], *(other.double() for other in hiddens[1:]), *others]
        wide = [leaves[1], *(other.double() for other in weights[1:])]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for part in zip(*(tensor.split(_REFERENCE_TOKENS) for tensor in rows), strict=True):
            share = loss(*map(F.linear, part, wide), *part[len(wide) :]) * len(part[0]) / length
            share.backward()
            total += share.detach()
        return {"loss": [total], "dX": [leaves[0].grad], "dW": [leaves[1].grad]}

    def step(loss_of: Callable[[], Tensor]) -> Callable[[], Step]:
        def run() -> Tensor:
            value = loss_of()
            value.backward()
            return value.detach()

        return lambda: run

    return Contest(
        block=block,
        length=length,
        leaves=[hidden, weight],
        forward_multiply_adds=length * weight.numel(),
        contestants={
            UNMODIFIED: step(lambda: plain(*hiddens, *others)),
            "per-chunk checkpoint": step(checkpointed),
            "ours": step(ours),
        },
        peers={},
        values=lambda value: {"loss": [value], "dX": [hidden.grad], "dW": [weight.grad]},
        expected=reference,
    )
