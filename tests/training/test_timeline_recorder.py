"""Which step is drawn, and torch's snapshot of it on CUDA."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_mst import apply_mst
from lightning_mst.memory.places import Places
from lightning_mst.memory.step_tensors import tensors_of_step
from lightning_mst.training.timeline import TimelineRecorder


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2))


def recorder(tmp_path, device: str = "cpu", accumulate: int = 1, **options) -> TimelineRecorder:
    pytest.importorskip("matplotlib")
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device(device)), default_root_dir=str(tmp_path / "run"),
        global_step=0, is_global_zero=True, accumulate_grad_batches=accumulate, **options,
    )  # fmt: skip
    handle = apply_mst(TwoLayers(), mlp_chunks=None, lm_head_chunks=None, checkpoint_layers="none")
    result = TimelineRecorder(trainer, handle)
    result.trainer = trainer
    return result


def take(one: TimelineRecorder, batch_idx: int) -> None:
    with tensors_of_step(TwoLayers(), [], None, Places({}), record=True) as held:
        one.begin()
        torch.ones(3)
    one.end(held, one._handle.model, None, batch_idx)
    one.trainer.global_step += 1


def test_the_first_step_is_kept_until_there_is_a_second(tmp_path):
    one = recorder(tmp_path)
    assert one.wants(0)
    take(one, 0)
    assert not (tmp_path / "run").exists()
    assert one.wants(1)
    take(one, 1)
    assert (tmp_path / "run" / "memory_timeline.png").exists()
    assert not one.wants(2)


def test_of_accumulated_batches_the_one_with_the_optimizers_step_is_taken(tmp_path):
    one = recorder(tmp_path, accumulate=3)
    assert [one.wants(i) for i in range(3)] == [False, False, True]
    take(one, 2)
    assert [one.wants(i) for i in range(3, 6)] == [False, False, True]


def test_other_ranks_draw_nothing(tmp_path):
    one = recorder(tmp_path)
    one.trainer.is_global_zero = False
    assert not TimelineRecorder(one.trainer, one._handle).wants(0)


def test_on_cuda_torchs_snapshot_is_taken_and_recording_ends(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(path))
    one = recorder(tmp_path, "cuda:0")
    take(one, 0)
    assert calls == [{"max_entries": 200_000}, str(tmp_path / "run" / "memory_snapshot.pickle"), {"enabled": None}]
    one.begin()
    one.drop_step()  # as after an exception
    assert calls[3:] == [{"max_entries": 200_000}, {"enabled": None}]
