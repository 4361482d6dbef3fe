"""Apple's cut-cross-entropy."""

from __future__ import annotations

from torch import Tensor

from benchmarks.measure import Step
from benchmarks.peers import require


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Step:
    require("cut_cross_entropy", hidden.device, needs_gpu=True)
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

    def step() -> Tensor:
        loss = cut_cross_entropy(hidden, weight, labels)
        loss.backward()
        return loss.detach()

    return step
