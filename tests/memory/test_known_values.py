"""Integers keep their values among fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from lightning_mst.memory.known_values import KnownValues
from lightning_mst.memory.rehearsal import new_fake_mode

LABELS = torch.tensor([3, -100, 5, -100, 7])


def test_what_follows_from_given_integers_is_known():
    fake = new_fake_mode()
    with fake, KnownValues(fake) as values:
        labels = values.give(LABELS)
        live = labels != -100
        assert labels[live].shape == (3,)
        assert live.sum().item() == 3
        assert labels.max().item() == 7
        assert torch.empty(5, 2)[live.nonzero().squeeze(1)].shape == (3, 2)


def test_a_number_read_from_other_tensors_is_one_and_other_integers_are_unknown():
    fake = new_fake_mode()
    with fake, KnownValues(fake):
        assert torch.empty(3).norm().item() == 1.0
        with pytest.raises(DataDependentOutputException):
            torch.empty(3, dtype=torch.int64).sum().item()
