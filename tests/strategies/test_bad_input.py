"""What goes wrong in a user's hands: said in words, before a step is spent. And what goes right without a word."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

sys.path.insert(0, str(Path(__file__).parent))

from cases import CHUNKS, Module, build, rows

from lightning_mst import MSTCallback, MSTConfig, OptimizerInBackward
from lightning_mst.ops.deferred_logits import DeferredLogits
from lightning_mst.strategies import (
    MSTDDPStrategy,
    MSTFSDPStrategy,
    MSTModelParallelStrategy,
    MSTSingleDeviceStrategy,
)
from lightning_mst.training.checks import check_trainer

CONFIG = MSTConfig(**CHUNKS)


class Program(Module):
    """Notes which kind of logits it sees in all four stages."""

    def __init__(self) -> None:
        super().__init__(build())
        self.seen: list[type] = []

    def train_dataloader(self) -> DataLoader:
        return DataLoader(rows(4, ragged=False), batch_size=2)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits
        self.seen.append(type(logits))
        return logits.argmax(-1)

    test_step = predict_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Nothing to compute."""

    @property
    def is_as_it_was(self) -> bool:
        # Lightning itself leaves a forward in the LightningModule's own entries after DDP.
        shadows = any("_mst" in vars(module) or "forward" in vars(module) for module in self.model.modules())
        return not shadows and "configure_model" not in vars(self)


def trainer(**options: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 2,
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**defaults, **options})


def check_refused(error: type[Exception], message: str, program: LightningModule | None = None, **options: Any) -> None:
    program = program or Program()
    with pytest.raises(error, match=message):
        trainer(**options).fit(program)
    assert not getattr(program, "losses", [])  # no step was spent


# --- names and settings --------------------------------------------------------------------------------------------


def test_a_misspelt_strategy_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="invalid strategy name: `strategy='mst_dpp'`"):
        trainer(strategy="mst_dpp")


@pytest.mark.parametrize("strategy", [MSTSingleDeviceStrategy, MSTDDPStrategy, MSTFSDPStrategy])
def test_settings_that_are_no_config_are_refused_when_the_strategy_is_made(strategy: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"mst should be an MSTConfig, got dict: \{'mlp_chunks': 3\}"):
        strategy(mst={"mlp_chunks": 3})


def test_an_unknown_way_out_of_a_full_memory_is_refused_when_the_callback_is_made() -> None:
    with pytest.raises(ValueError, match=r"on_oom='again' is not a choice. Expected 'raise' or 'retry'"):
        MSTCallback(on_oom="again")


def test_one_device_is_what_the_single_device_strategy_trains_on() -> None:
    with pytest.raises(MisconfigurationException, match=r"one device, got 2. Set Trainer\(devices=1\), or .*'mst_ddp'"):
        trainer(strategy="mst", devices=2)


def test_two_callbacks_are_one_too_many() -> None:
    check_refused(
        MisconfigurationException, "has 2 MSTCallbacks. Keep one", callbacks=[MSTCallback(), MSTCallback(**CHUNKS)]
    )


def test_different_settings_of_strategy_and_callback_are_both_named() -> None:
    check_refused(
        MisconfigurationException,
        r"different settings: MSTConfig\(mlp_chunks=3.* and MSTConfig\(mlp_chunks=5.* Give them to one of the two",
        strategy=MSTSingleDeviceStrategy(mst=CONFIG),
        callbacks=[MSTCallback(mlp_chunks=5)],
    )


# --- a strategy, a callback, or both -------------------------------------------------------------------------------

WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "callback alone": lambda: {"callbacks": [MSTCallback(**CHUNKS)]},
    "strategy alone": lambda: {"strategy": MSTSingleDeviceStrategy(mst=CONFIG)},
    "both, with equal settings": lambda: {
        "strategy": MSTSingleDeviceStrategy(mst=CONFIG),
        "callbacks": [MSTCallback(**CHUNKS)],
    },
    "both, settings with the callback": lambda: {"strategy": "mst", "callbacks": [MSTCallback(**CHUNKS)]},
    "a strategy of several processes alone": lambda: {"strategy": MSTDDPStrategy(mst=CONFIG)},
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_of_asking_rewrites_the_model_once_and_trains_the_same_weights(
    way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, ours = Program(), Program()
    trainer().fit(plain)
    runner = trainer(**WAYS[way]())
    forms: list[str] = []
    ours.on_train_start = lambda: forms.extend(
        row.form for row in next(c for c in runner.callbacks if isinstance(c, MSTCallback)).handle.rows
    )
    runner.fit(ours)
    assert sum(isinstance(callback, MSTCallback) for callback in runner.callbacks) == 1
    assert sorted(forms) == ["M = 3"] * 3 + ["checkpointed"] * 2
    for name, wanted in plain.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), wanted, rtol=1e-4, atol=1e-6)
    assert capsys.readouterr().out.count("Mini-sequence form of Program") == 1
    assert 0.01 < float(runner.callback_metrics["peak_memory_gib"]) < 100
    assert ours.is_as_it_was


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("way", ["strategy alone", "a strategy of several processes alone"])
def test_a_strategy_alone_serves_every_stage_and_gives_the_model_back(way: str, stage: str) -> None:
    program = Program()
    runner = trainer(limit_val_batches=2, **WAYS[way]())
    for _ in range(2):  # the same Trainer may be used again
        getattr(runner, stage)(program, **({} if stage == "predict" else {"verbose": False}))
        assert program.is_as_it_was
    assert program.seen == [DeferredLogits] * 4


# --- checkpointing twice -------------------------------------------------------------------------------------------


def with_wrapped_layers() -> Program:
    program = Program()
    layers = program.model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    return program


def test_layers_that_torch_checkpoints_already_are_refused_by_name() -> None:
    check_refused(
        MisconfigurationException,
        r"switched on twice, by the CheckpointWrapper around model.model.layers.0 .*set checkpoint_layers='none'",
        with_wrapped_layers(),
        callbacks=[MSTCallback(**CHUNKS)],
    )


def test_layers_that_torch_checkpoints_are_fine_if_ours_is_off() -> None:
    plain, ours = Program(), with_wrapped_layers()
    trainer().fit(plain)
    trainer(callbacks=[MSTCallback(**CHUNKS, checkpoint_layers="none")]).fit(ours)
    for wanted, got in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", [FSDPStrategy, MSTFSDPStrategy])
def test_fsdps_own_checkpointing_policy_is_refused_beside_ours(strategy: Callable[..., Any]) -> None:
    runner = trainer()
    # Lightning makes a Trainer with FSDP only where there is a GPU.
    runner._accelerator_connector.strategy = strategy(activation_checkpointing_policy={LlamaDecoderLayer})
    with pytest.raises(MisconfigurationException, match=r"twice, by the strategy's activation_checkpointing_policy"):
        check_trainer(runner, MSTConfig())
    check_trainer(runner, MSTConfig(checkpoint_layers="none"))


# --- the other Lightning -------------------------------------------------------------------------------------------


def test_the_callback_in_a_trainer_of_pytorch_lightning_says_what_to_import() -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise AssertionError("a step was spent")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_steps": 1}
    runner = other.Trainer(callbacks=[MSTCallback()], **options)
    with pytest.raises(TypeError, match=r"pytorch_lightning.* write `from lightning.pytorch import Trainer`"):
        runner.fit(Other(), DataLoader(rows(4, ragged=False)))


def test_a_strategy_in_a_trainer_of_pytorch_lightning_is_refused_when_the_trainer_is_made() -> None:
    other = pytest.importorskip("pytorch_lightning")
    with pytest.raises(ValueError, match=r"an instance of `pytorch_lightning.strategies.Strategy`"):
        other.Trainer(accelerator="cpu", strategy=MSTDDPStrategy())


# --- sharding ------------------------------------------------------------------------------------------------------


def test_tensor_parallelism_without_a_plan_is_refused() -> None:
    # Before any second process would be needed.
    strategy = MSTModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    program = Program()
    program.trainer = trainer()
    with pytest.raises(MisconfigurationException, match=r"tensor_parallel_size=2 needs a plan.*configure_model"):
        strategy.connect(program)


def test_a_trained_weight_that_nobody_shards_is_named() -> None:
    program = Program()
    program.scale = nn.Parameter(torch.ones(()))
    check_refused(
        MisconfigurationException,
        "1 trained weights, such as scale, are not sharded",
        program,
        strategy="mst_model_parallel",
    )
    assert program.is_as_it_was


def test_a_frozen_weight_needs_no_sharding() -> None:
    program = Program()
    program.scale = nn.Parameter(torch.ones(()), requires_grad=False)
    trainer(strategy="mst_model_parallel").fit(program)
    assert len(program.losses) == 2


def test_fsdp1_without_a_gpu_says_what_works_there() -> None:
    check_refused(MisconfigurationException, r"needs GPUs, got CPUs. Use 'mst_model_parallel'", strategy="mst_fsdp")


# --- token weights, retries ----------------------------------------------------------------------------------------


class Packed(Program):
    """Its batches have no labels."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader([{"input_ids": row["input_ids"]} for row in rows(4, ragged=False)], batch_size=2)


class Manual(Program):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_token_weights_of_a_batch_without_labels_say_what_the_batch_has() -> None:
    check_refused(
        MisconfigurationException,
        r"batch\['labels'\], but the batch has the keys input_ids. Give a function",
        Packed(),
        callbacks=[MSTCallback(**CHUNKS, token_weighted=True)],
    )


def test_token_weights_are_refused_with_manual_optimization() -> None:
    check_refused(
        MisconfigurationException,
        "token_weighted=True needs automatic optimization",
        Manual(),
        callbacks=[MSTCallback(**CHUNKS, token_weighted=True)],
    )


def test_retries_are_refused_with_manual_optimization() -> None:
    check_refused(
        MisconfigurationException,
        "on_oom='retry' repeats the training step.* Use on_oom='raise'",
        Manual(),
        callbacks=[MSTCallback(**CHUNKS, on_oom="retry")],
    )


def test_retries_are_refused_with_an_optimizer_in_the_backward_pass() -> None:
    program = Program()
    program.optimizer = lambda parameters: OptimizerInBackward(parameters, lambda p: torch.optim.SGD(p, lr=0.1))
    check_refused(
        MisconfigurationException,
        "half of whose gradients OptimizerInBackward has taken already. Use on_oom='raise'",
        program,
        callbacks=[MSTCallback(**CHUNKS, on_oom="retry")],
    )
    assert program.is_as_it_was


@pytest.mark.parametrize("size", ["auto", 0, 1.5])
def test_a_size_that_is_no_number_of_ranks_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match=f"tensor_parallel_size should be a whole number of ranks, .* got {size!r}"):
        MSTModelParallelStrategy(tensor_parallel_size=size)
