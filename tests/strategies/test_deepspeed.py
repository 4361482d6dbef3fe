"""DeepSpeed through Lightning on one CPU process: the same weights with and without mini-sequences.

Several ranks, gathers and memory are in ``tests/rewrite/test_zero3.py``, on DeepSpeed's own engine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from torch import Tensor, nn
from torch.utils.cpp_extension import _get_build_directory
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))

from cases import CHUNKS, Module, build, rows

from lightning_mst import MSTCallback, MSTConfig
from lightning_mst.on_host import deepspeed_cpu_adam
from lightning_mst.ops.deferred_logits import DeferredLogits
from lightning_mst.strategies import MSTDeepSpeedStrategy
from lightning_mst.training.optimizers import connect_optimizers
from lightning_mst.training.token_weights import TokenWeights

deepspeed = pytest.importorskip("deepspeed")
cpu_adam = pytest.importorskip("deepspeed.ops.adam.cpu_adam")
CPUAdamBuilder = pytest.importorskip("deepspeed.ops.op_builder").CPUAdamBuilder


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

    def __init__(self, *, tied: bool, own_loss: bool, make: Callable[..., Any] | None = None) -> None:
        super().__init__(build(tied))
        self.own_loss, self.make = own_loss, make
        self.seen: set[type] = set()
        self.weights: dict[str, Tensor] = {}

    def configure_optimizers(self) -> Any:
        if self.make is None:
            return super().configure_optimizers()
        return self.make(self.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)

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


class Kernel:
    """The arithmetic of DeepSpeed's Adam for the CPU, which takes a minute to compile."""

    def create_adam(self, *_: Any) -> None:
        """It keeps nothing."""

    destroy_adam = create_adam

    def adam_update(
        self, _: int, step: int, lr: float, beta1: float, beta2: float, eps: float, decay: float, correct: bool,
        weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor,
    ) -> None:  # fmt: skip
        assert correct
        weight.mul_(1 - lr * decay)
        first.lerp_(gradient, 1 - beta1)
        second.lerp_(gradient.square(), 1 - beta2)
        weight.sub_(lr * first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + eps))


@contextmanager
def with_kernel(kernel: Callable[[], Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cpu_adam, "CPUAdamBuilder", lambda: SimpleNamespace(load=kernel))
        yield


def is_compiled() -> bool:
    """Whether somebody has waited for the real kernel on this machine."""
    return (Path(_get_build_directory(CPUAdamBuilder().name, verbose=False)) / "cpu_adam.so").exists()


def engine_config(stage: int, *, on_host: bool = False) -> dict[str, Any]:
    # Nothing is small enough to stay, so that every weight comes and goes.
    keep = {
        f"stage3_{name}": 0 for name in ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters")
    }
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}} if on_host else {}
    return {
        "zero_optimization": {"stage": stage, **keep, **offload},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": 2,
    }


def train(strategy: DeepSpeedStrategy, *callbacks: Any, **options: Any) -> Program:
    program = Program(**options)
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
    result["AdamW"] = train(Plain(config=engine_config(3)), **ADAM, make=torch.optim.AdamW)
    with with_kernel(Kernel):
        result["stand-in"] = train_on_host()
    result["compiled"] = train_on_host() if is_compiled() else None
    return result


ADAM = {"tied": False, "own_loss": False}


def train_on_host() -> Program:
    settings = MSTConfig(**CHUNKS, checkpoint_layers="all")
    return train(Ours(config=engine_config(3, on_host=True), mst=settings), **ADAM, make=deepspeed_cpu_adam)


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


@pytest.mark.parametrize("kernel", ["stand-in", "compiled"])
def test_with_states_on_the_host_its_adam_for_the_cpu_gives_adamws_weights_from_what_the_planner_counts(
    programs: dict[Any, Program], kernel: str
) -> None:
    ours, plain = programs[kernel], programs["AdamW"]
    if ours is None:
        pytest.skip("DeepSpeed's kernel is not compiled on this machine, which would take a minute")
    for name, weight in plain.weights.items():
        torch.testing.assert_close(ours.weights[name], weight, rtol=1e-5, atol=1e-5)

    engine = ours.trainer.strategy.model.optimizer
    numbers = sum(parameter.ds_numel for parameter in ours.parameters())
    in_fp32 = [tensor for weight in engine.fp32_partitioned_groups_flat for tensor in (weight, weight.grad)]
    in_fp32 += [
        value for state in engine.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    ]
    of_weights = [*engine.param_groups_fp16_flat_cpu_memory, engine.grad_partitions_flat_buffer]
    assert sum(tensor.nbytes for tensor in in_fp32) == 16 * numbers  # what RehearsedCPUAdam makes
    assert sum(tensor.numel() for tensor in of_weights) == 2 * numbers  # weights and gradients, in the weights' dtype


@pytest.mark.parametrize(
    ("make", "on_host", "message"),
    [
        (torch.optim.AdamW, True, r"configure_optimizers made AdamW\. Make a deepspeed\.ops\.adam\.DeepSpeedCPUAdam"),
        (deepspeed_cpu_adam, False, r"DeepSpeedCPUAdam steps in the host's memory, but Ours keeps optimizer states on"),
    ],
)
def test_states_on_the_host_and_an_optimizer_for_them_come_together(
    make: Callable[..., Any], on_host: bool, message: str
) -> None:
    strategy = Ours(config=engine_config(3, on_host=on_host))
    strategy._lightning_module = program = Program(**ADAM, make=make)
    program.trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    with with_kernel(Kernel), pytest.raises(MisconfigurationException, match=message):
        strategy._init_optimizers()


def test_under_another_strategy_weights_on_a_device_are_refused_before_a_step() -> None:
    def connect(device: str) -> None:
        optimizer = deepspeed_cpu_adam([nn.Parameter(torch.zeros(2, device=device))])
        connect_optimizers(SimpleNamespace(strategy=SimpleNamespace(optimizers=[optimizer])))

    with with_kernel(Kernel):
        connect("cpu")
        with pytest.raises(MisconfigurationException, match="under SimpleNamespace they are on a device"):
            connect("meta")


def test_a_kernel_that_cannot_be_compiled_is_told_with_what_it_takes() -> None:
    def fail() -> None:
        raise RuntimeError("Ninja is required to load C++ extensions")

    with with_kernel(fail), pytest.raises(ValueError, match=r"failed: Ninja is required .*\nIt takes a C\+\+ compiler"):
        deepspeed_cpu_adam([nn.Parameter(torch.zeros(2))])
