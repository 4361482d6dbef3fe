"""Measures cases on two ranks, started as a user starts a script: `python run_distributed.py FILE`."""

from __future__ import annotations

import os
import pickle
import sys
import warnings

import torch
from lightning.pytorch.strategies import DDPStrategy
from memory_tools import CONFIGS, adamw, adamw_in_backward, causal_lm, causal_loss, real_step, token_batch

from lightning_mst.strategies import MSTModelParallelStrategy

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

LAYERS, LENGTH = 5, 512
# By name: strategy, whether gradients are views of buckets, config, optimizer, precision.
CASES = {
    "FSDP2": ("fsdp2", True, "M=3,5", adamw, "32-true"),
    "FSDP2, recomputed, mixed precision": ("fsdp2", True, "recompute", adamw, "bf16-mixed"),
    "FSDP2, optimizer in backward": ("fsdp2", True, "M=3,5", adamw_in_backward, "32-true"),
    "DDP": ("ddp", True, "M=3,5", adamw, "32-true"),
    "DDP, gradients beside the buckets": ("ddp", False, "recompute", adamw, "32-true"),
    "DDP, optimizer in backward": ("ddp", True, "M=3,5", adamw_in_backward, "32-true"),
}


def main() -> None:
    totals = {}
    for name, (strategy, view, config, optimizer, precision) in CASES.items():
        sharded = strategy == "fsdp2"
        watch = real_step(
            causal_lm(num_hidden_layers=LAYERS),
            [token_batch(1, LENGTH)] * 6,
            causal_loss,
            optimizer,
            CONFIGS["off" if sharded else config],  # the strategy rewrites by itself
            devices=2,
            strategy=MSTModelParallelStrategy(mst=CONFIGS[config])
            if sharded
            else DDPStrategy(gradient_as_bucket_view=view),
            precision=precision,
        )
        totals[name] = watch.total
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with open(sys.argv[1], "wb") as file:
            pickle.dump(totals, file)


if __name__ == "__main__":
    main()
