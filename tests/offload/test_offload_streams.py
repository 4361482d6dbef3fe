"""Copies beside the computation, on a GPU."""

from __future__ import annotations

import gc

import pytest
import torch
from offload_models import build, distance, gradients, loss_of, offload_of, tokens
from torch import Tensor, nn

from lightning_mst import apply_mst
from lightning_mst.ops.host_memory import SLAB_BYTES, HostMemory
from lightning_mst.ops.moved import Moved, lane_of
from lightning_mst.rewrite.auto_fraction import copied_per_second

pytestmark = pytest.mark.gpu

SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}


def on_gpu() -> nn.Module:
    return build(dtype=torch.bfloat16, **SIZES).cuda()


def loss(model: nn.Module) -> Tensor:
    return loss_of(model, input_ids=tokens(1, 8192).cuda())


def test_slabs_are_pinned_and_the_copy_is_as_fast_as_the_bus():
    memory = HostMemory()
    device = torch.device("cuda", torch.cuda.current_device())
    slabs = memory.take(SLAB_BYTES + 1, device)
    assert all(slab.is_pinned() for slab in slabs)
    memory.give_back(slabs)
    assert copied_per_second(device, 2**30) > 2e9
    memory.release()
    assert memory.allocated == 0


def test_memory_that_is_used_again_at_once_is_not_overwritten_while_it_is_copied():
    memory = HostMemory()
    for round_ in range(20):
        source = torch.full((64, 2**20), float(round_), device="cuda")
        moved = Moved(source, memory)
        del source
        moved.leave()
        # Takes the memory that has just been given up, on the same stream.
        torch.full((64, 2**20), -1.0, device="cuda")
        moved.return_early()
        torch.full((64, 2**20), -2.0, device="cuda")
        assert bool((moved.fetch() == round_).all())
    # What dies on its way back does not write into memory that belongs to others by then.
    moved = Moved(torch.zeros(64, 2**20, device="cuda"), memory)
    moved.leave()
    moved.return_early()
    del moved
    others = torch.full((64, 2**20), 5.0, device="cuda")
    torch.cuda.synchronize()
    assert bool((others == 5).all())


@pytest.mark.parametrize("options", [
    {"checkpoint_offload": "inputs"},
    {"checkpoint_offload": "inputs+attention"},
    {"checkpoint_offload": "inputs+attention", "layer_chunks": 4, "offload_fraction": 0.5},
    {"checkpoint_offload": "inputs+attention", "layer_chunks": 4, "offload_fraction": "auto"},
])  # fmt: skip
def test_gradients_are_those_without_offload_and_the_device_holds_less(options):
    model = on_gpu()
    apply_mst(model, mlp_chunks=4, lm_head_chunks=None, layer_chunks=options.get("layer_chunks"))
    expected = gradients(model, loss)
    torch.cuda.reset_peak_memory_stats()
    gradients(model, loss)
    before = torch.cuda.max_memory_allocated()
    handle = apply_mst(model, mlp_chunks=4, lm_head_chunks=None, **options)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        # Attention's backward pass adds up in an order of its own each time.
        assert distance(gradients(model, loss), expected) < 1e-2
    if options["checkpoint_offload"] == "inputs":
        assert torch.cuda.max_memory_allocated() < before
    assert offload_of(handle).memory.in_use == 0
    model.zero_grad()
    gc.collect()
    taken = torch.cuda.memory_allocated()
    handle.remove()
    assert torch.cuda.memory_allocated() <= taken


def test_the_program_does_not_wait_for_the_copies():
    model = on_gpu()
    apply_mst(model, mlp_chunks=4, lm_head_chunks=None, checkpoint_offload="inputs+attention")
    gradients(model, loss)
    torch.cuda.synchronize()
    # Synchronising calls, such as a copy to memory that is not pinned, raise in this mode.
    ids = tokens(1, 8192).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        hidden = model.model(input_ids=ids, attention_mask={"full_attention": None}, use_cache=False).last_hidden_state
        hidden.square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_copies_and_computation_overlap():
    device = torch.device("cuda", torch.cuda.current_device())
    lane, memory = lane_of(device), HostMemory()
    tensor = torch.randn(2**26, device=device)  # 256 MiB: 5 to 20 ms over the bus
    matrix = torch.randn(8192, 8192, device=device)
    for _ in range(2):  # the first time allocates
        moved = Moved(tensor, memory)
        matrix @ matrix
        moved.leave()
        del moved
    torch.cuda.synchronize()
    start = lane.mark()
    Moved(tensor, memory).leave()
    copy_alone = lane.seconds_between(start, lane.mark())
    start = lane.mark()
    products = [matrix @ matrix for _ in range(4)]
    compute_alone = lane.seconds_between(start, lane.mark())
    start = lane.mark()
    moved = Moved(tensor, memory)
    products = [matrix @ matrix for _ in range(4)]
    moved.leave()
    both = lane.seconds_between(start, lane.mark())
    assert len(products) == 4
    assert both < 0.8 * (copy_alone + compute_alone)
