"""How often FSDP2 gathers weights and reduces gradients in a step, on two ranks: no more often than without us."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))

from cases import RANKS, build, head_alone, per_layer, per_mlp, rows

from lightning_mst import apply_mst
from lightning_mst.training.sharding import shard_models


class CollectiveCounter(TorchDispatchMode):
    """Counts collective operations by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            name = func._schema.name
            kind = "all-gather" if "allgather" in name or "all_gather" in name else name
            self.counts[kind] = self.counts.get(kind, 0) + 1
        return func(*args, **(kwargs or {}))


def ours(module: Any, mesh: Any) -> None:
    holder = nn.Module()
    holder.model = module.model
    shard_models(holder, mesh["data_parallel"], "32-true")


LAYOUTS: dict[str, tuple[Callable[[Any, Any], None], bool, int]] = {
    # How to shard; whether the head is tied; how many more gathers the head's own unit costs.
    "ours": (ours, False, 0),
    "ours, tied": (ours, True, 0),
    "by layer": (per_layer, False, 0),
    "by MLP": (per_mlp, False, 0),
    "head alone": (head_alone, False, 1),
}


def count(layout: str, checkpoint: str, mst: bool) -> dict[str, int]:
    shard, tied, _ = LAYOUTS[layout]
    model = build(tied)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("data_parallel",))
    shard(SimpleNamespace(model=model), mesh)
    chunks = 4 if mst else None
    apply_mst(model, mlp_chunks=chunks, lm_head_chunks=chunks, checkpoint_layers=checkpoint)
    batch = rows(RANKS, ragged=False)[dist.get_rank()]
    ids = batch["input_ids"].unsqueeze(0)
    for _ in range(2):  # the first step has extras
        model.zero_grad()
        with CollectiveCounter() as collectives:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return collectives.counts


def by_matrix() -> tuple[str, str]:
    """Sharded by matrix: what the table says of the MLPs if they are sharded first, and the error if they are later."""
    mesh = init_device_mesh("cpu", (RANKS,))
    ids = rows(1, ragged=False)[0]["input_ids"].unsqueeze(0)
    notes = []
    for shard_first in (True, False):
        model = build()
        handle = None if shard_first else apply_mst(model, mlp_chunks=3, lm_head_chunks=3)
        for layer in model.model.layers:
            for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                fully_shard(matrix, mesh=mesh)
        fully_shard(model, mesh=mesh)
        handle = handle or apply_mst(model, mlp_chunks=3, lm_head_chunks=3)
        note = next(row.reason for row in handle.rows if row.block == "MLP")
        try:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        except RuntimeError as error:
            note = str(error)
        notes.append(note)
    return notes[0], notes[1]


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    counts = {
        (layout, checkpoint): (count(layout, checkpoint, False), count(layout, checkpoint, True))
        for layout in LAYOUTS
        for checkpoint in ("all", "none")
    }
    counts["by matrix"] = by_matrix()
    if rank == 0:
        torch.save(counts, f"{folder}/counts")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = str(tmp_path_factory.mktemp("counts"))
    mp.spawn(run_rank, (folder,), nprocs=RANKS)
    return torch.load(f"{folder}/counts")


@pytest.mark.parametrize("checkpoint", ["all", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_gathered_and_gradients_reduced_as_often_as_without_mini_sequences(
    counts: dict[Any, Any], layout: str, checkpoint: str
) -> None:
    without, with_mst = counts[layout, checkpoint]
    assert without["all-gather"] > 0
    assert {**with_mst, "all-gather": with_mst["all-gather"] - LAYOUTS[layout][2]} == without


def test_an_mlp_whose_matrices_are_units_is_left_alone_or_refused(counts: dict[Any, Any]) -> None:
    sharded_before, sharded_after = counts["by matrix"]
    assert "parts of it are FSDP units" in sharded_before
    assert "parts of it are FSDP units" in sharded_after
