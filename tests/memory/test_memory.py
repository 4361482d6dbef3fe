"""What is measured is what was allocated."""

from __future__ import annotations

import pytest
import torch

from lightning_mst.memory import PeakMemory, TensorBytes
from lightning_mst.memory import peak as peak_module

MIB = 2**20


def test_tensor_bytes_counts_storages_once_and_forgets_them_when_they_are_gone():
    given = torch.ones(MIB)
    with TensorBytes([given]) as tracker:
        a = torch.ones(MIB)  # 4 MiB
        view = a[10:].view(-1)
        b = given + a
        assert tracker.live == 8 * MIB
        del a
        assert tracker.live == 8 * MIB, "the view keeps the storage alive"
        del view, b
        assert tracker.live == 0
        given.add_(1)
    assert tracker.peak == 8 * MIB


def test_tensor_bytes_sees_what_backward_keeps_and_frees():
    x = torch.ones(MIB, requires_grad=True)
    with TensorBytes([x]) as tracker:
        x.exp().sum().backward()
        assert tracker.live == 4 * MIB, "x.grad is left"
    assert 8 * MIB <= tracker.peak <= 12 * MIB + 16


def test_peak_memory_of_the_process_rises_with_an_allocation_and_is_reset():
    memory = PeakMemory(torch.device("cpu"))
    if not memory.resettable:
        pytest.skip(memory.description)
    memory.reset()
    before = memory.read()
    torch.ones(64 * MIB)  # 256 MiB, gone at once
    assert memory.read() - before == pytest.approx(256 * MIB, rel=0.1)
    memory.reset()
    assert memory.read() - before < 64 * MIB


def test_where_the_system_cannot_reset_the_peak_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(peak_module, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    memory = PeakMemory(torch.device("cpu"))
    assert not memory.resettable
    assert "since its start" in memory.description
    assert memory.read() > 0


def test_without_proc_the_operating_systems_own_figure_is_used(monkeypatch, tmp_path):
    monkeypatch.setattr(peak_module, "_STATUS", tmp_path / "status")
    assert PeakMemory(torch.device("cpu")).read() > 50 * MIB


@pytest.mark.gpu
def test_peak_memory_of_an_accelerator_is_the_allocators():
    device = torch.device("cuda", 0)
    memory = PeakMemory(device)
    memory.reset()
    before = memory.read()
    torch.ones(64 * MIB, device=device)
    assert memory.read() - before == 256 * MIB
