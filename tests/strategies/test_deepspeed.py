"""DeepSpeed through Lightning on one CPU process: the same weights with and without mini-sequences.

Several ranks, gathers and memory are in ``tests/rewrite/test_zero3.py``, on DeepSpeed's own engine.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Read by DeepSpeed when it is imported.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))

from cases import CHUNKS, Module, build, rows

from lightning_mst import MSTCallback, MSTConfig
from lightning_mst.ops.deferred_logits import DeferredLogits
from lightning_mst.strategies import MSTDeepSpeedStrategy
from lightning_mst.training.token_weights import TokenWeights

deepspeed = pytest.importorskip("deepspeed")


class _OnCPU:
    """Lightning's strategy asks for an accelerator; DeepSpeed itself does not."""

    root_device = property(lambda self: torch.device("cpu", 0))

    def setup_environment(self) -> None:
        ParallelStrategy.setup_environment(self)
        self.set_world_ranks()
        # DeepSpeed's own shared-memory all-reduce would be compiled first.
        import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        self._init_deepspeed_distributed()


class Plain(_OnCPU, DeepSpeedStrategy):
    pass


class Ours(_OnCPU, MSTDeepSpeedStrategy):
    pass


class Program(Module):
    """Its loss is the model's, or its own."""

    def __init__(self, *, tied: bool, own_loss: bool) -> None:
        super().__init__(build(tied))
        self.own_loss = own_loss
        self.seen: set[type] = set()
        self.weights: dict[str, Tensor] = {}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(rows(4, ragged=False), batch_size=2)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if not self.own_loss:
            return super().training_step(batch, batch_idx)
        ids = batch["input_ids"]
        logits = self.model(input_ids=ids, use_cache=False).logits
        self.seen.add(type(logits))
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """DeepSpeed keeps the gradients to itself."""

    def on_train_end(self) -> None:
        for name, parameter in self.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                self.weights[name] = parameter.detach().clone()


def engine_config(stage: int) -> dict[str, Any]:
    # Nothing is small enough to stay, so that every weight comes and goes.
    keep = {
        f"stage3_{name}": 0 for name in ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters")
    }
    return {
        "zero_optimization": {"stage": stage, **keep},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": 2,
    }


def train(strategy: DeepSpeedStrategy, *callbacks: Any, tied: bool, own_loss: bool) -> Program:
    program = Program(tied=tied, own_loss=own_loss)
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        max_steps=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(program)
    assert trainer.global_step == 2
    return program


RUNS = [(stage, checkpoint, tied) for stage in (2, 3) for checkpoint in ("all", "none") for tied in (False, True)]


@pytest.fixture(scope="module")
def programs() -> dict[Any, Program]:
    """All trained programs; at once, as DeepSpeed keeps the process group of the first."""
    result: dict[Any, Program] = {}
    for stage, checkpoint, tied in RUNS:
        options = {"tied": tied, "own_loss": checkpoint == "all"}
        settings = MSTConfig(**CHUNKS, checkpoint_layers=checkpoint)
        result[stage, checkpoint, tied, "plain"] = train(Plain(config=engine_config(stage)), **options)
        result[stage, checkpoint, tied, "ours"] = train(Ours(config=engine_config(stage), mst=settings), **options)
    result["callback"] = train(Plain(config=engine_config(3)), MSTCallback(**CHUNKS), tied=False, own_loss=True)
    return result


def check_same_weights(ours: Program, plain: Program, *, tied: bool) -> None:
    if plain.own_loss:
        assert plain.seen == {Tensor}
        assert ours.seen == {DeferredLogits}
    untrained = dict(Program(tied=tied, own_loss=False).named_parameters())
    assert plain.weights.keys() == ours.weights.keys() == untrained.keys()
    for name, wanted in plain.weights.items():
        assert not torch.equal(wanted, untrained[name])
        torch.testing.assert_close(ours.weights[name], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("stage", "checkpoint", "tied"), RUNS)
def test_two_steps_give_the_weights_of_lightnings_own_strategy(
    programs: dict[Any, Program], stage: int, checkpoint: str, tied: bool
) -> None:
    ours, plain = (programs[stage, checkpoint, tied, who] for who in ("ours", "plain"))
    check_same_weights(ours, plain, tied=tied)


def test_lightnings_own_strategy_with_the_callback_does_the_same(programs: dict[Any, Program]) -> None:
    check_same_weights(programs["callback"], programs[3, "all", False, "plain"], tied=False)


def test_token_weights_of_accumulated_batches_are_refused() -> None:
    strategy = MSTDeepSpeedStrategy.__new__(MSTDeepSpeedStrategy)
    module = SimpleNamespace(automatic_optimization=True)
    with pytest.raises(MisconfigurationException, match=r"accumulate_grad_batches=2 .* DeepSpeed keeps to itself"):
        TokenWeights().setup(SimpleNamespace(strategy=strategy, accumulate_grad_batches=2), module, "fit")


def test_token_weights_of_single_batches_are_not() -> None:
    strategy = MSTDeepSpeedStrategy.__new__(MSTDeepSpeedStrategy)
    module = SimpleNamespace(automatic_optimization=True)
    weights = TokenWeights()
    weights.setup(SimpleNamespace(strategy=strategy, accumulate_grad_batches=1), module, "fit")
    assert "backward" in strategy.__dict__
    weights.teardown(SimpleNamespace(), module, "fit")
    assert "backward" not in strategy.__dict__
