"""Two processes that shard a small model, or keep copies of it, with layers' inputs and attention on the host.

`python run_offload_ranks.py FILE`: writes the gradients of both kinds in every mode to FILE.RANK.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from offload_models import build, loss_of, offload_of, tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_mst import apply_mst

RANKS = 2
MODES: dict[str, dict[str, Any]] = {
    "inputs": {"checkpoint_offload": "inputs"},
    "inputs+attention": {"checkpoint_offload": "inputs+attention"},
    "fraction": {"checkpoint_offload": "inputs+attention", "layer_chunks": 3, "offload_fraction": 0.7},
}


def gradients_of(model: nn.Module, wrapped: nn.Module, rank: int) -> dict[str, torch.Tensor]:
    for _ in range(2):  # the second step finds the slabs of the first
        model.zero_grad()
        loss_of(wrapped, input_ids=tokens(RANKS)[rank : rank + 1]).backward()
    gathered = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        gathered[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
    return gathered


def run(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    results: dict[str, Any] = {}
    for mode, options in MODES.items():
        model = build()
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        handle = apply_mst(model, mlp_chunks=3, lm_head_chunks=None, **options)
        results[f"FSDP2, {mode}"] = gradients_of(model, model, rank)
        assert offload_of(handle).memory.in_use == 0
        model = build()
        handle = apply_mst(model, mlp_chunks=3, lm_head_chunks=None, **options)
        results[f"DDP, {mode}"] = gradients_of(model, DistributedDataParallel(model), rank)
        assert offload_of(handle).memory.in_use == 0
    torch.save(results, f"{file}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(run, (sys.argv[1],), nprocs=RANKS)
