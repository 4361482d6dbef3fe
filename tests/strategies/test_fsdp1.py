"""FSDP1 on two ranks: exact gradients however the model is cut into units, and hardly a gather more than without us."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import FSDPPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import (
    CustomPolicy,
    ModuleWrapPolicy,
    size_based_auto_wrap_policy,
    transformer_auto_wrap_policy,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

sys.path.insert(0, str(Path(__file__).parent))

from cases import CHUNKS, RANKS, VOCAB, Module, build, rows
from test_communication import CollectiveCounter

from lightning_mst import MSTHandle, apply_mst
from lightning_mst.training.sharding import check_tied_weights, layer_policy, wrapped_by


class Step(nn.Module):
    """What Lightning wraps: a module whose forward is the training step."""

    def __init__(self, model: nn.Module, own_loss: bool) -> None:
        super().__init__()
        self.model, self.own_loss = model, own_loss

    def forward(self, ids: Tensor) -> Tensor:
        if not self.own_loss:
            return self.model(input_ids=ids, labels=ids, use_cache=False).loss
        logits = self.model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))


def layers(step: Step, handle: MSTHandle) -> Any:
    return layer_policy(handle.layers)


def mlps_too(step: Step, handle: MSTHandle) -> Any:
    return ModuleWrapPolicy({LlamaDecoderLayer, LlamaMLP})


def head_too(step: Step, handle: MSTHandle) -> Any:
    return layer_policy([*handle.layers, step.model.lm_head])


def nothing(step: Step, handle: MSTHandle) -> None:
    return None


@dataclass(frozen=True)
class Case:
    """How the model is sharded, and what it computes.

    Attributes:
        policy: makes the ``auto_wrap_policy``.
        tied: whether the LM head is tied to the embedding.
        own_loss: whether the training step computes the loss, not the model.
        more_gathers: than without mini-sequences.
    """

    policy: Callable[[Step, MSTHandle], Any] = layers
    tied: bool = False
    own_loss: bool = False
    more_gathers: int = 0


CASES = {
    "layers": Case(),
    "layers, tied": Case(tied=True),
    "layers, loss in the step": Case(own_loss=True),
    "layers, tied, loss in the step": Case(tied=True, own_loss=True),
    "MLPs": Case(mlps_too),
    "head alone": Case(head_too, more_gathers=1),
    "head alone, loss in the step": Case(head_too, own_loss=True, more_gathers=1),
    "one unit": Case(nothing),
}
PRECISIONS = ("32-true", "bf16-mixed")


def run(case: Case, precision: str, checkpoint: str, mst: bool) -> dict[str, Any]:
    step = Step(build(case.tied), case.own_loss)
    chunks = CHUNKS if mst else dict.fromkeys(CHUNKS)
    handle = apply_mst(step, checkpoint_layers=checkpoint, **chunks)
    sharded = FullyShardedDataParallel(
        step,
        auto_wrap_policy=case.policy(step, handle),
        use_orig_params=True,
        device_id=torch.device("cpu"),
        mixed_precision=FSDPPrecision(precision).mixed_precision_config,
    )
    ids = rows(RANKS, ragged=False)[dist.get_rank()]["input_ids"].unsqueeze(0)
    for _ in range(2):  # the first step has extras
        sharded.zero_grad()
        with CollectiveCounter() as collectives:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = sharded(ids)
            loss.backward()
    dist.all_reduce(loss.detach(), dist.ReduceOp.AVG if False else dist.ReduceOp.SUM)
    with FullyShardedDataParallel.summon_full_params(sharded, with_grads=True):
        gradients = {
            name.replace("_fsdp_wrapped_module.", ""): parameter.grad.double()
            for name, parameter in sharded.named_parameters()
        }
    return {"loss": loss.item() / RANKS, "gradients": gradients, "counts": collectives.counts}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    results: dict[Any, Any] = {}
    for name, case in CASES.items():
        for precision in PRECISIONS:
            for checkpoint in ("all", "none"):
                for mst in (False, True):
                    key = name, precision, checkpoint, mst
                    try:
                        results[key] = run(case, precision, checkpoint, mst)
                    except Exception:
                        results[key] = {"error": traceback.format_exc()}
    torch.save(results, f"{folder}/results.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    import tempfile, collections
    folder = tempfile.mkdtemp()
    mp.spawn(run_rank, (folder,), nprocs=RANKS)
    r = torch.load(f"{folder}/results.0")
    for k, v in r.items():
        print(k, v.get("loss"), v.get("counts"), v.get("error", "")[-900:])
        base = r[(k[0], "32-true", "none", False)]
        if "gradients" in v and "gradients" in base:
            print("     ", max(((v["gradients"][n]-g).norm()/g.norm()).item() for n, g in base["gradients"].items()))
