"""What can go wrong between ranks, started as a user starts a script: `python run_scenarios.py FILE SCENARIO...`."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from cases import RANKS, VOCAB, Module, build
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mst import MSTCallback
from lightning_mst.strategies import MSTDDPStrategy

warnings.filterwarnings("ignore")
torch.set_num_threads(1)


def train(module: Module, strategy: Any, callback: MSTCallback, **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=strategy,
        callbacks=[callback],
        max_steps=options.pop("max_steps", 2),
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module)
    return trainer


class OwnBatches(Module):
    """Each rank has its own batches."""

    def __init__(self, batches: list[list[tuple[Tensor, Tensor]]], **options: Any) -> None:
        super().__init__(build(), **options)
        self.batches = batches

    def train_dataloader(self) -> DataLoader:
        rows = [{"input_ids": ids, "labels": labels} for ids, labels in self.batches[self.global_rank]]
        return DataLoader(rows, batch_size=None)


def batches(*lengths: int, ignored: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Sequences of these lengths with their labels."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = [torch.randint(VOCAB, (1, length), generator=generator) for length in lengths]
    return [(row, torch.full_like(row, -100) if ignored else row) for row in ids]


class CountChunks(nn.Module):
    """In place of an activation function."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function, self.chunks = function, 0

    def forward(self, x: Tensor) -> Tensor:
        self.chunks += 1
        return self.function(x)


def of_different_lengths(strategy: str, mlp_chunks: Any) -> dict[str, Any]:
    # The last length is shorter than the number of mini-sequences on the other rank.
    module = OwnBatches([batches(64, 48), batches(20, 2)])
    counter = module.model.model.layers[0].mlp.act_fn = CountChunks(module.model.model.layers[0].mlp.act_fn)
    chunks: list[int] = []
    reductions: list[int] = []
    all_reduce, calls = dist.all_reduce, [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return all_reduce(*args, **kwargs)

    class Notes(MSTCallback):
        def on_train_batch_start(self, *args: Any) -> None:
            counter.chunks = calls[0] = 0
            dist.all_reduce = counted
            super().on_train_batch_start(*args)

        def on_after_backward(self, *args: Any) -> None:
            dist.all_reduce = all_reduce
            chunks.append(counter.chunks)
            reductions.append(calls[0])

    train(module, strategy, Notes(mlp_chunks=mlp_chunks, lm_head_chunks=3))
    return {"gradients": module.gradients, "chunks": chunks, "reductions": reductions}


def one_rank_without_labels(strategy: str) -> dict[str, Any]:
    module = OwnBatches([batches(21, 22), batches(23, 24, ignored=True)], token_weighted=True)
    train(module, strategy, MSTCallback(mlp_chunks=3, lm_head_chunks=3))
    return {"gradients": module.gradients}


class Limit(nn.Module):
    """An activation function for which there is memory for so many tokens only, on one rank."""

    def __init__(self, function: nn.Module, tokens: int, rank: int, *, backward: bool) -> None:
        super().__init__()
        self.function, self.tokens, self.rank, self.backward = function, tokens, rank, backward
        self.out_of_memory = 0

    def forward(self, x: Tensor) -> Tensor:
        me = dist.get_rank() if dist.is_initialized() else 0
        if me == self.rank and x.shape[-2] > self.tokens and x.requires_grad == self.backward:
            self.out_of_memory += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.function(x)


def out_of_memory(backward: bool, strategy: Any = "mst_ddp") -> dict[str, Any]:
    module = OwnBatches([batches(21, 22, 23, 24), batches(23, 24, 25, 26)], token_weighted=True)
    mlp = module.model.model.layers[1].mlp
    limit = mlp.act_fn = Limit(mlp.act_fn, 6, rank=1, backward=backward)
    callback = MSTCallback(mlp_chunks=2, lm_head_chunks=3, on_oom="retry")
    factors: list[int] = []
    callback.on_after_backward = lambda *_: factors.append(callback.handle.pace.factor)
    train(module, strategy, callback, accumulate_grad_batches=2)
    return {"gradients": module.gradients, "factors": factors, "out_of_memory": limit.out_of_memory}


def different_settings() -> dict[str, Any]:
    import os

    rank = int(os.environ.get("LOCAL_RANK", 0))
    train(OwnBatches([batches(21), batches(21)]), "mst_ddp", MSTCallback(mlp_chunks=2 + rank))
    return {}


def retry_when_sharded() -> dict[str, Any]:
    train(OwnBatches([batches(21), batches(21)]), "mst_model_parallel", MSTCallback(on_oom="retry"))
    return {}


def split_tie() -> dict[str, Any]:
    from cases import ShardedByUser, head_alone

    module = type("Sharded", (ShardedByUser,), {"shard": staticmethod(head_alone)})(build(tied=True))
    train(module, "mst_model_parallel", MSTCallback(mlp_chunks=2))
    return {}


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    "lengths, DDP": lambda: of_different_lengths("mst_ddp", "paper"),
    "lengths, FSDP2": lambda: of_different_lengths("mst_model_parallel", "paper"),
    "lengths, a number": lambda: of_different_lengths("mst_ddp", 3),
    "no labels, DDP": lambda: one_rank_without_labels("mst_ddp"),
    "no labels, FSDP2": lambda: one_rank_without_labels("mst_model_parallel"),
    "out of memory, forward": lambda: out_of_memory(backward=False),
    "out of memory, backward": lambda: out_of_memory(backward=True),
    "out of memory, buckets": lambda: out_of_memory(True, MSTDDPStrategy(gradient_as_bucket_view=True)),
    "different settings": different_settings,
    "retry when sharded": retry_when_sharded,
    "split tie": split_tie,
}


def fail() -> None:
    class Failing(OwnBatches):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            if self.global_rank == 1 and batch_idx == 1:
                raise ValueError("rank 1 can't go on")
            return super().training_step(batch, batch_idx)

    train(Failing([batches(21, 22), batches(21, 22)]), "mst_model_parallel", MSTCallback(mlp_chunks=3))


def main() -> None:
    file, *names = sys.argv[1:]
    if names == ["--fail"]:
        fail()
    results: dict[str, Any] = {}
    for name in names:
        try:
            results[name] = SCENARIOS[name]()
        except Exception as error:
            results[name] = {"error": traceback.format_exc(), "message": str(error), "class": type(error).__name__}
    torch.save(results, f"{file}.{dist.get_rank()}")


if __name__ == "__main__":
    main()
