"""The user's own training step on fake tensors: what its memory should be."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from lightning_mst.in_backward.optimizer import OptimizerInBackward
from lightning_mst.memory.devices import DEVICES, Device
from lightning_mst.memory.prediction import Prediction, predict, vocab_size_of
from lightning_mst.memory.rehearsal import Step, fake_copy, new_fake_mode, rehearse
from lightning_mst.memory.setting import PRECISIONS
from lightning_mst.memory.tensor_bytes import TensorBytes
from lightning_mst.rewrite.config import MSTConfig
from lightning_mst.rewrite.handle import MSTHandle, apply_mst
from lightning_mst.training.one_step import loss_of_training_step
from lightning_mst.training.random_states import random_states, set_random_states
from lightning_mst.training.side_effects import without_side_effects

__all__ = ["HALF_PRECISION", "CannotRehearse", "RehearsedProgram", "is_compiled"]

HALF_PRECISION = {name: autocast for name, (_, autocast) in PRECISIONS.items() if autocast is not None}
STANDARD = MSTConfig(mlp_chunks=None, lm_head_chunks=None, checkpoint_layers="none")


class RehearsedProgram:
    """A fake copy of a LightningModule, and its training step on one batch.

    The copy has the same form (mini-sequences, checkpointed layers), takes the same ``training_step`` and
    ``configure_optimizers``, and shares nothing with the original but the Trainer. It logs nothing, and its metrics
    rest. Attention is modelled as the flash kernel.

    Args:
        trainer: the Trainer.
        pl_module: the LightningModule, on one device.
        batch: the batch.
        batch_idx: its number.

    Raises:
        CannotRehearse: sharded, quantized or compiled models, manual optimization, or a module that can't be copied.
            Its methods raise it, too, if the program does what fake tensors can't.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        reason = _why_not(trainer, pl_module)
        if reason is not None:
            raise CannotRehearse(reason)
        self._device = trainer.strategy.root_device
        self._kind: Device = DEVICES.get(self._device.type, DEVICES["cuda"])
        self._fake = new_fake_mode()
        with _giving_reasons("the LightningModule can't be copied"):
            self._module = fake_copy(pl_module, self._fake, shared=[trainer])
        assert isinstance(self._module, LightningModule)
        for module in self._module.modules():
            if isinstance(module, Metric):
                _put_to_rest(module)
            elif isinstance(module, _DeviceDtypeModuleMixin):
                # As Lightning's own setup does: programs make tensors on `self.device`.
                module._device = torch.device("cpu")
        autocast = HALF_PRECISION.get(str(trainer.precision))

        def compute_loss(module: nn.Module, batch: Any) -> Tensor:
            assert isinstance(module, LightningModule)
            if autocast is not None:
                return loss_of_training_step(module, batch, batch_idx, wanted_by="A rehearsal")
            with trainer.precision_plugin.train_step_context():
                return loss_of_training_step(module, batch, batch_idx, wanted_by="A rehearsal")

        self._handle: MSTHandle | None = None
        self._step = Step(
            move_data_to_device(batch, torch.device("cpu")),
            compute_loss,
            _optimizer_of,
            autocast=autocast,
            accumulates=trainer.accumulate_grad_batches > 1,
            on_gpu=self._kind.is_gpu,
        )

    def predict(self) -> Prediction:
        """The peak of a step whose optimizer has its states: the last of the batches that it accumulates."""
        return self._predict(self._step)

    def predict_first_passes(self) -> Prediction:
        """The peak of the forward and backward pass of a run's first batch: no optimizer states, no gradients yet."""
        return self._predict(replace(self._step, make_optimizer=lambda _: None, accumulates=False))

    def predict_as(self, config: MSTConfig) -> Prediction:
        """The same as ``predict``, of the model in another form; the copy keeps it."""
        self._rewrite(config)
        return self.predict()

    def _rewrite(self, config: MSTConfig) -> None:
        if self._handle is None:
            self._handle = apply_mst(self._module, config)
        else:
            self._handle.update(config)

    def _predict(self, step: Step) -> Prediction:
        with _aside(self._module, self._device):
            return predict(self._module, step, self._fake, device=self._kind)

    def record_standard(self) -> TensorBytes:
        """The course of a step without mini-sequences or checkpointing, all layers of it."""
        self._rewrite(STANDARD)
        with _aside(self._module, self._device):
            return rehearse(self._module, self._step, self._fake, vocab_size=vocab_size_of(self._module), record=True)


class CannotRehearse(Exception):
    """Why there can be no rehearsal, in half a sentence."""


@contextmanager
def _giving_reasons(what: str) -> Iterator[None]:
    """Makes a reason of any error: a program may do what it likes, and must train without a prediction as well."""
    try:
        yield
    except CannotRehearse:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        raise CannotRehearse(f"{what} ({type(error).__name__}: {lines[0].rstrip('.')})") from error


@contextmanager
def _aside(module: LightningModule, device: torch.device) -> Iterator[None]:
    """Leaves logs and random numbers as they are."""
    states = random_states(device)
    try:
        with _giving_reasons("the training step can't run on fake tensors"), without_side_effects(module):
            yield
    finally:
        set_random_states(states, device)


def _why_not(trainer: Trainer, pl_module: LightningModule) -> str | None:
    """Why a program can't be rehearsed, or ``None``."""
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        return f"{type(trainer.strategy).__name__} keeps buffers and shards that are not modelled"
    if not pl_module.automatic_optimization:
        return "with manual optimization, training_step takes the steps itself"
    if is_compiled(pl_module):
        return "what a compiled model keeps is up to the compiler"
    for name, parameter in pl_module.named_parameters():
        if not parameter.is_floating_point() or is_traceable_wrapper_subclass(parameter):
            return f"{name} is quantized ({type(parameter).__name__} of {parameter.dtype})"
    return None


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` has been at a module or one of its parts."""
    if getattr(module, "_compiler_ctx", None) is not None:  # Lightning takes the wrapper of a whole one away
        return True
    dynamo = sys.modules.get("torch._dynamo")  # which takes a second to import, and what it compiled has imported it
    return any(
        part._compiled_call_impl is not None or (dynamo is not None and isinstance(part, dynamo.OptimizedModule))
        for part in module.modules()
    )


def _put_to_rest(metric: Metric) -> None:
    """Its checks of values would fail on fake tensors, and its memory is small."""

    def zero(*_: Any, **__: Any) -> Tensor:
        return torch.zeros(())

    metric.to("cpu")
    metric.__dict__.update(update=lambda *_, **__: None, forward=zero, compute=zero)


def _optimizer_of(module: nn.Module) -> Optimizer:
    assert isinstance(module, LightningModule)
    found = [leaf for leaf in tree_leaves(module.configure_optimizers()) if isinstance(leaf, Optimizer)]
    if len(found) != 1:
        raise CannotRehearse(f"configure_optimizers makes {len(found)} optimizers")
    if isinstance(found[0], OptimizerInBackward):
        found[0].attach(module)
    return found[0]
