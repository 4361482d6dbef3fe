from __future__ import annotations

import pytest
import torch
from rewrite_models import VOCAB
from torch import Tensor


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Two sequences of 33 tokens (which 4 does not divide), ignored labels first, last and in between."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, 33), generator=generator)
    labels = ids.clone()
    labels[torch.rand(2, 33, generator=generator) < 0.3] = -100
    labels[0, :3] = -100
    labels[:, -1] = -100
    return ids, labels


@pytest.fixture(autouse=True)
def _forget_who_asked_for_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mst.ops.deferred_logits._asked", set())
