"""The peak of a step, and where it occurred."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_mst.memory import PeakMemory, TensorBytes
from lightning_mst.memory import peak as peak_module
from lightning_mst.memory.log import MemoryLog, PeakByPlace, StepMemory
from lightning_mst.memory.places import Place, Places, blocks_of
from lightning_mst.memory.step_tensors import tensors_of_step

FORWARD, BACKWARD = Place("forward", "", "0"), Place("backward", "layers.1", "mlp")


class FakeAccelerator:
    """A device module whose allocator has given out what a ``TensorBytes`` counts, in blocks of 512 bytes."""

    def __init__(self, held: TensorBytes) -> None:
        self._held = held
        self.resets = 0

    def memory_stats_as_nested_dict(self, device: torch.device) -> dict:
        peak = -(-self._held.peak // 512) * 512
        return {"allocated_bytes": {"all": {"peak": peak}}, "reserved_bytes": {"all": {"peak": 2 * peak}}}

    def max_memory_allocated(self, device: torch.device) -> int:
        return self._held.peak

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self._held.peak = self._held.live
        self.resets += 1


def accelerator(monkeypatch: pytest.MonkeyPatch, module: object) -> PeakMemory:
    monkeypatch.setattr(peak_module, "_module", lambda device: module)
    return PeakMemory(torch.device("cuda", 0))


def test_the_allocators_peak_is_found_at_the_place_where_the_tensors_are(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 400), nn.ReLU(), nn.Linear(400, 16))
    places = Places(blocks_of(model))
    tokens = torch.randint(0, 50, (64,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tensors_of_step(model, [optimizer], tokens, places) as held:
        module = FakeAccelerator(held)
        memory = accelerator(monkeypatch, module)
        peaks = PeakByPlace(memory, places)
        with places.followed():
            loss = model(tokens).square().sum()
            places.phase = "backward"
            loss.backward()
            places.phase = "optimizer"
            optimizer.step()
        reading = peaks.end()
        allocator = dict(peaks.peaks)
    assert module.resets > 8
    # A place that allocates nothing has what is alive.
    assert {place.phase for place in allocator} == {"forward", "backward", "optimizer"}
    for place, peak in held.peaks.items():
        assert peak.total <= allocator[place] <= peak.total + 512
    highest = max(held.peaks.items(), key=lambda item: item[1].total)
    assert max(allocator, key=lambda place: allocator[place]) == highest[0]
    assert 0 <= reading.peak - highest[1].total < 512
    assert reading.reserved == 2 * reading.peak


def test_an_accelerator_without_nested_statistics_is_asked_for_its_maximum(monkeypatch):
    module = SimpleNamespace(max_memory_allocated=lambda device: 7, reset_peak_memory_stats=lambda device: None)
    memory = accelerator(monkeypatch, module)
    assert (memory.of_allocator, memory.resettable) == (True, True)
    assert memory.read_all() == (7, None)
    assert memory.read() == 7


def test_a_step_tells_its_phases_and_where_each_was_highest():
    step = StepMemory(3, 9, {FORWARD: 9, BACKWARD: 8, Place("backward", "", ""): 2})
    assert step.place == FORWARD
    assert step.phases == {"forward": 9, "backward": 8}
    assert step.place_in(["backward"]) == BACKWARD
    assert step.place_in(["optimizer"]) is None
    assert str(StepMemory(0, 3 * 2**30, {BACKWARD: 3 * 2**30})) == "3.00 GiB, backward of layers.1, mlp"
    assert StepMemory(0, 5).place is None
    assert str(StepMemory(0, 5 * 2**20)) == "5.0 MiB"


def test_the_log_keeps_the_last_step_and_the_highest():
    log = MemoryLog()
    steps = [StepMemory(i, peak) for i, peak in enumerate((3, 9, 4))]
    for step in steps:
        log.add(step)
    assert (log.last, log.highest) == (steps[2], steps[1])


def test_a_step_counts_what_is_there_already_by_its_kind():
    model = nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.ones(10, 100)
    for _ in range(2):
        with tensors_of_step(model, [optimizer], {"x": x}, Places({})) as held:
            model(x).sum().backward()
            optimizer.step()
    size = 4 * (100 * 100 + 100)
    kinds = held.peaks[Place("forward", "", "")].kinds
    assert kinds["weights"] == size
    assert kinds["gradients"] == size
    assert kinds["optimizer_states"] == pytest.approx(2 * size, abs=16)
    assert kinds["buffers"] == x.nbytes
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_measurement_that_is_over_goes_although_the_tensors_stay():
    """Else a long run would keep one for each of its steps."""
    model = nn.Linear(10, 10)
    with tensors_of_step(model, [], None, Places({})) as held:
        kept = model(torch.ones(2, 10))
    gone = weakref.ref(held)
    del held
    gc.collect()
    assert gone() is None
    assert kept.shape == (2, 10)
