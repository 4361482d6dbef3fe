"""PyTorch's own chunked LM head, ``F.linear_cross_entropy`` with options."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Step
from benchmarks.peers import CannotRun


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int | None = None) -> Step:
    """Its default chunks depend on the sequence's length; with ``chunk_tokens`` it gets chunks of that many tokens."""
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        raise CannotRun(f"torch {torch.__version__} has no chunked F.linear_cross_entropy; 2.13 has")
    if chunk_tokens is None:
        options = nn.LinearCrossEntropyOptions()
    else:
        options = nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=chunk_tokens)

    def step() -> Tensor:
        loss = F.linear_cross_entropy(hidden, weight, labels, options=options)
        loss.backward()
        return loss.detach()

    return step
