"""Runs cases on two ranks, started as a user starts a script: `python run_cases.py FILE CASE...`."""

from __future__ import annotations

import sys
import traceback
import warnings
from typing import Any

import torch
from cases import CASES, RANKS, STEPS, Case, Module, ShardedByUser, build
from lightning.pytorch import Trainer

from lightning_mst import MSTCallback

warnings.filterwarnings("ignore")
torch.set_num_threads(1)


def run(case: Case) -> dict[str, Any]:
    config = case.config
    callback = MSTCallback.of_config(config)
    callback.token_weighted = case.token_weighted == "callback"
    trainer = Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=case.strategy if isinstance(case.strategy, str) else case.strategy(),
        callbacks=[callback],
        max_steps=STEPS,
        accumulate_grad_batches=case.batches,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **case.trainer,
    )
    options = {"token_weighted": True} if case.token_weighted == "module" else {}
    model = build(case.tied)
    if case.shard is None:
        module = Module(model, **options)
    else:
        module = type("Sharded", (ShardedByUser,), {"shard": staticmethod(case.shard)})(model, **options)
    if case.unused:
        module.unused = torch.nn.Linear(2, 2)
    module.rows = case.data()
    trainer.fit(module)
    return {"gradients": module.gradients, "losses": module.losses}


def main() -> None:
    file, *names = sys.argv[1:]
    results: dict[str, Any] = {}
    for name in names:
        try:
            results[name] = run(CASES[name])
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.save(results, f"{file}.{rank}")


if __name__ == "__main__":
    main()
