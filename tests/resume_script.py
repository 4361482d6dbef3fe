"""A training run that can be killed and resumed; test_resume.py runs it, in its own process and in others.

python resume_script.py FOLDER STRATEGY RANK...    # trains into FOLDER until these ranks kill themselves
python resume_script.py FOLDER single              # the same on one device, killed while it writes a checkpoint
python resume_script.py FOLDER compare STRATEGY=RUN...     # see `compare`
"""

from __future__ import annotations

import os
import random
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from fsspec.implementations import local
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import OneCycleLR
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from lightning_mst import MSTCallback
from lightning_mst.causal_lm import CausalLM
from lightning_mst.data import TextDataModule
from lightning_mst.strategies import MSTModelParallelStrategy

STEPS_PER_EPOCH, STEPS = 6, 11
SCHEDULES = {
    "one cycle": partial(OneCycleLR, max_lr=2e-3, total_steps=STEPS),  # of betas, too
    "cosine": partial(get_cosine_schedule_with_warmup, num_warmup_steps=2, num_training_steps=STEPS),
}
KILLED_IN_STEP, LAST_CHECKPOINT = 10, 8  # steps 10 and 8 are the fourth and the second of the second epoch


class ShardedCausalLM(CausalLM):
    """For Lightning's own strategy: one unit of FSDP2."""

    def configure_model(self) -> None:
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


class Kill(pl.Callback):
    """Ends some ranks as the kernel or an administrator does: at once, with nothing saved or said."""

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == KILLED_IN_STEP - 1 and trainer.global_rank in self.ranks:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_while_moving(source: str, target: str) -> None:
    """Stands in for the last step of saving a checkpoint: from one file system to another, and killed half-way."""
    content = Path(source).read_bytes()
    if Path(target).stem == f"step={KILLED_IN_STEP}":
        Path(target).write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    Path(target).write_bytes(content)


def data(folder: Path, processes: int) -> TextDataModule:
    made = TextDataModule(
        source="text",
        paths=str(folder / "texts"),
        vocab_size=300,
        sequence_length=64,
        batch_size=4 // processes,
        max_tokens=64 * 4 * STEPS_PER_EPOCH,
        cache_dir=folder / "cache",
    )
    made.prepare_data()
    made.setup()
    return made


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    config.attention_dropout = 0.2
    return LlamaForCausalLM(config).train()


def trainer_for(strategy: str, callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    with_mst = any(isinstance(callback, MSTCallback) for callback in callbacks)
    sharded: Any = MSTModelParallelStrategy if with_mst else ModelParallelStrategy
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    return pl.Trainer(
        accelerator="cpu",
        devices=1 if strategy == "single" else 2,
        strategy={
            "single": "auto",
            "ddp": "ddp",
            "fsdp2": sharded(**sizes),
            "fsdp2 in one file": sharded(**sizes, save_distributed_checkpoint=False),
        }[strategy],
        callbacks=callbacks,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def train(
    folder: Path,
    strategy: str,
    name: str,
    *,
    mst: bool = True,
    schedule: str = "one cycle",
    resume: Path | None = None,
    kill: list[int] | None = None,
    seed: int = 0,
) -> None:
    """Train for STEPS steps, with a checkpoint after every second one.

    Args:
        folder: With the texts in ``texts``.
        strategy: ``"single"``, ``"ddp"``, ``"fsdp2"`` or ``"fsdp2 in one file"``, which is how it writes checkpoints.
        name: Of the folder in ``folder`` to write to.
        mst: Whether mini-sequences are used.
        schedule: Of the learning rate.
        resume: Checkpoint to go on from.
        kill: Ranks that kill themselves.
        seed: Decides weights and random states at the beginning.
    """
    batches = data(folder, 1 if strategy == "single" else 2)
    shards_itself = strategy.startswith("fsdp2") and not mst
    module = (ShardedCausalLM if shards_itself else CausalLM)(llama(seed), scheduler=SCHEDULES[schedule])
    saving = ModelCheckpoint(folder / name, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    callbacks: list[pl.Callback] = [saving]
    if mst:
        callbacks.append(MSTCallback(mlp_chunks=3, lm_head_chunks=3))
    if kill:
        callbacks.append(Kill(kill))
    trainer = trainer_for(strategy, callbacks, max_steps=STEPS, limit_val_batches=1, val_check_interval=3)
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(10 * seed + trainer.global_rank)  # dropout of its own on every rank
    trainer.fit(module, datamodule=batches, ckpt_path=resume)
    trainer.save_checkpoint(folder / name / "final.ckpt")


def compare(folder: Path, strategy: str, run: str) -> None:
    """All runs of a strategy that end: whole, resumed, then resumed without mini-sequences and from there with them.

    Then whole and resumed with the other schedule.

    Args:
        folder: As for :func:`train`.
        strategy: As for :func:`train`.
        run: Name of the run to resume, such as one that was killed.
    """
    last = folder / run / f"step={LAST_CHECKPOINT}.ckpt"
    train(folder, strategy, f"{strategy} whole")
    train(folder, strategy, f"{strategy} resumed", resume=last, seed=5)
    train(folder, strategy, f"{strategy} without", resume=last, seed=5, mst=False)
    written_without = folder / f"{strategy} without" / f"step={KILLED_IN_STEP}.ckpt"
    train(folder, strategy, f"{strategy} with again", resume=written_without, seed=5)
    last = folder / f"{strategy} cosine" / f"step={LAST_CHECKPOINT}.ckpt"
    train(folder, strategy, f"{strategy} cosine", schedule="cosine")
    train(folder, strategy, f"{strategy} cosine resumed", schedule="cosine", resume=last, seed=5)


if __name__ == "__main__":
    target, what, *rest = sys.argv[1:]
    if what == "compare":
        for pair in rest:
            compare(Path(target), *pair.split("=", 1))
    elif what == "single":
        local.shutil.move = kill_while_moving
        train(Path(target), what, "single killed")
    else:
        train(Path(target), what, " ".join([what, "killed", *rest]), kill=[int(rank) for rank in rest])
