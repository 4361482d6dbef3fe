"""The pool of host memory, tensors that are moved there, and how much of it there is."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path

import pytest
import torch

from lightning_mst.memory.tensor_bytes import TensorBytes
from lightning_mst.ops import free_host_memory as free_module
from lightning_mst.ops import host_memory as host_module
from lightning_mst.ops.host_memory import SLAB_BYTES, HostMemory, NotEnoughHostMemory
from lightning_mst.ops.moved import Moved

CPU = torch.device("cpu")


def test_slabs_waste_little_and_are_used_again():
    memory = HostMemory()
    for size, expected in [(1, 2**16), (2**16 + 1, 2**17), (SLAB_BYTES, SLAB_BYTES), (0, 0)]:
        assert sum(slab.nbytes for slab in memory.take(size, CPU)) == expected
    memory = HostMemory()
    slabs = memory.take(3 * SLAB_BYTES + 1, CPU)
    assert memory.in_use == memory.allocated == 3 * SLAB_BYTES + 2**16
    memory.give_back(slabs)
    assert memory.in_use == 0
    again = memory.take(2 * SLAB_BYTES, CPU)
    assert {slab.data_ptr() for slab in again} < {slab.data_ptr() for slab in slabs}
    memory.release()
    assert memory.allocated == memory.in_use == 2 * SLAB_BYTES
    memory.give_back(again)
    memory.release()
    assert memory.allocated == memory.in_use == 0


def test_a_larger_slab_serves_where_none_of_the_size_is_left():
    memory = HostMemory()
    memory.give_back(memory.take(SLAB_BYTES, CPU))
    moved = Moved(torch.arange(5.0), memory)
    assert memory.in_use == memory.allocated == SLAB_BYTES
    assert moved.host_bytes == 2**16  # what it would take
    moved.leave()
    assert torch.equal(moved.fetch(), torch.arange(5.0))


def test_a_copy_of_a_pool_is_empty():
    memory = HostMemory()
    slabs = memory.take(100, CPU)
    for twin in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert twin.allocated == twin.in_use == 0
    assert memory.in_use == slabs[0].nbytes


def test_a_pool_that_can_not_grow_says_what_was_asked_for_and_what_there_is(monkeypatch):
    memory = HostMemory()
    kept = memory.take(SLAB_BYTES, CPU)

    def refuse(*args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("cudaHostAlloc: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(host_module.torch, "empty", refuse)
        with pytest.raises(NotEnoughHostMemory, match=r"refused 16\.0 MiB more of host memory.*checkpoint_offload"):
            memory.take(SLAB_BYTES, CPU)
    with monkeypatch.context() as patch:
        patch.setattr(host_module, "free_host_memory", lambda: 300 * 2**20)
        memory.take(SLAB_BYTES, CPU)
        patch.setattr(host_module, "free_host_memory", lambda: 200 * 2**20)
        with pytest.raises(NotEnoughHostMemory, match=r"only 0\.20 GiB are free"):
            memory.take(4 * SLAB_BYTES, CPU)
    assert memory.in_use == 2 * SLAB_BYTES
    assert kept[0].nbytes == SLAB_BYTES


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4),
        torch.arange(24, dtype=torch.bfloat16).reshape(2, 3, 4).transpose(0, 1),
        torch.arange(24.0).reshape(4, 6)[:, 2:5],
        torch.arange(4.0).expand(3, 4),
        torch.arange(6.0, dtype=torch.float64)[2:],
        torch.tensor(3.0),
        torch.arange(3 * 2**20 + 5.0),
        torch.ones(3, 1, 5, dtype=torch.bool).permute(1, 2, 0),
    ],
)
def test_a_moved_tensor_comes_back_as_it_was(tensor):
    memory = HostMemory()
    expected = tensor.clone()
    moved = Moved(tensor, memory)
    assert moved.host_bytes == memory.in_use >= tensor.numel() * tensor.element_size()
    for early in (False, True, False):
        moved.leave()
        if early:
            moved.return_early()
        back = moved.fetch()
        assert back.dtype == expected.dtype
        assert torch.equal(back, expected)
        assert back.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    if tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.numel() > 1:
        assert back.stride() == tensor.stride() or tensor.shape[1:2] == (1,)
    del moved
    assert memory.in_use == 0


def test_a_tensor_that_has_not_left_needs_no_copy_back():
    tensor = torch.arange(12.0)
    moved = Moved(tensor, HostMemory())
    assert moved.fetch().data_ptr() == tensor.data_ptr()
    assert moved.fetch().data_ptr() != tensor.data_ptr()


def test_a_tensor_that_was_changed_while_it_left_is_noticed():
    tensor = torch.arange(12.0)
    moved = Moved(tensor, HostMemory())
    tensor.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        moved.leave()


def test_slabs_count_as_memory_of_the_host():
    held = TensorBytes()
    memory = HostMemory()
    with held:
        moved = Moved(torch.ones(2**20), memory)
        assert held.live == 2**22
        moved.leave()
        assert held.live == 0
        assert held._of_kind["host"] == memory.allocated == 2**22
        del moved
        memory.release()
        gc.collect()
        assert held._of_kind["host"] == 0


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_dot_", ".")).write_text(f"{content}\n")


def test_free_memory_is_what_the_tightest_limit_around_the_process_leaves(tmp_path, monkeypatch):
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    assert free_module._of_groups(own, root) == []  # such as on a Mac
    own.write_text("0::/outer/inner\n")
    write(root / "outer", memory_dot_max=1000, memory_dot_current=700, memory_dot_stat="anon 1\ninactive_file 50")
    write(root / "outer" / "inner", memory_dot_max="max", memory_dot_current=700)
    assert free_module._of_groups(own, root) == [350]
    # Version 1, and a path of outside of the container.
    own.write_text("5:cpu:/x\n4:memory:/docker/12345\n0::/\n")
    write(root / "memory", memory_dot_limit_in_bytes=900, memory_dot_usage_in_bytes=200)
    assert free_module._of_groups(own, root) == [700]
    monkeypatch.setattr(free_module, "_OWN_GROUPS", own)
    monkeypatch.setattr(free_module, "_GROUPS", root)
    assert free_module.free_host_memory() == 700
    monkeypatch.setattr(free_module, "_OWN_GROUPS", tmp_path / "none")
    assert 2**20 < free_module.free_host_memory() < 2**60
