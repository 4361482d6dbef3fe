"""A model on fake tensors with all that its training steps have in common, for one prediction after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mst.memory.devices import DEVICES, Device
from lightning_mst.memory.moving import fake_modules_move
from lightning_mst.memory.prediction import Prediction, predict
from lightning_mst.memory.rehearsal import Step, fake_copy, new_fake_mode
from lightning_mst.models import loss_of, takes_use_cache
from lightning_mst.rewrite.config import MSTConfig
from lightning_mst.rewrite.handle import MSTHandle, apply_mst

Batch = Mapping[str, Tensor]

PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "64-true": (torch.float64, None),
    "32-true": (torch.float32, None),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
}
"""By Lightning's name: the dtype of the weights, and that of autocast."""


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        precision: Lightning's name of it, such as ``"bf16-true"``.
        make_optimizer: from the model to its optimizer; see ``memory.optimizers``.
        prepare: what is made of the model before it trains (quantized, with adapters), in place or as another module.
        strategy: ``"single"``, ``"ddp"``, ``"fsdp2"``, ``"zero2"``, ``"zero3"`` or ``"zero3_offload"``.
        num_devices: over how many devices.
        accumulate_grad_batches: batches for one step of the optimizer.
        compute_loss: from the model and a batch of ``input_ids`` and ``labels``, int64 (B, S), to the loss.
        device: ``"cuda"`` or ``"cpu"``.
    """

    precision: str
    make_optimizer: Callable[[nn.Module], Optimizer | None]
    prepare: Callable[[nn.Module], nn.Module] = field(default=lambda model: model)
    strategy: str = "single"
    num_devices: int = 1
    accumulate_grad_batches: int = 1
    compute_loss: Callable[[nn.Module, Batch], Tensor] | None = None
    device: str = "cuda"

    def __post_init__(self) -> None:
        """Checks what has names."""
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is not known. Expected one of {', '.join(PRECISIONS)}.")
        if self.device not in DEVICES:
            raise ValueError(f"device={self.device!r} is not known. Expected one of {', '.join(DEVICES)}.")


class Setting:
    """A model and its training, ready to be rehearsed under any ``MSTConfig`` and length.

    Args:
        model: builds the model; called on fake tensors. Or a model, which is copied without its values.
        training: how it is trained.

    Attributes:
        model: the fake model.
        training: how it is trained.
        fake: the mode of its tensors.
    """

    def __init__(self, model: nn.Module | Callable[[], nn.Module], training: Training) -> None:
        self.training = training
        self.fake = new_fake_mode()
        dtype, _ = PRECISIONS[training.precision]
        if isinstance(model, nn.Module):
            built = fake_copy(model, self.fake)
        else:
            with self.fake, default_dtype(dtype):
                built = model()
            if not isinstance(built, nn.Module):
                raise TypeError(f"The function that builds the model returned {type(built).__name__}, not a module.")
            if training.precision.endswith("-true"):
                # As Lightning does to a module that was built without its context.
                with self.fake, fake_modules_move():
                    built = built.to(dtype)
        with self.fake, default_dtype(dtype):
            self.model = training.prepare(built).train()
        self._handle: MSTHandle | None = None

    def predict(self, config: MSTConfig, sequence_length: int, batch_size: int = 1) -> Prediction:
        """The peak of a step.

        Args:
            config: the form of the model.
            sequence_length: S.
            batch_size: B, sequences on each device.
        """
        self.rewrite(config)
        return predict(self.model, self.step(sequence_length, batch_size), self.fake, device=self.device)

    def rewrite(self, config: MSTConfig) -> None:
        """Puts the model into the form of a config."""
        if self._handle is None:
            if not config.asks_for_nothing:
                self._handle = apply_mst(self.model, config)
        else:
            self._handle.update(config)

    @property
    def device(self) -> Device:
        """What it runs on."""
        return DEVICES[self.training.device]

    def step(self, sequence_length: int, batch_size: int = 1) -> Step:
        """The step of a batch (B, S)."""
        training = self.training
        tokens = torch.zeros(batch_size, sequence_length, dtype=torch.int64)
        return Step(
            batch={"input_ids": tokens, "labels": tokens},
            compute_loss=training.compute_loss or _model_loss,
            make_optimizer=training.make_optimizer,
            autocast=PRECISIONS[training.precision][1],
            accumulates=training.accumulate_grad_batches > 1,
            on_gpu=self.device.is_gpu,
            strategy=training.strategy,
            num_devices=training.num_devices,
        )


def _model_loss(model: nn.Module, batch: Batch) -> Tensor:
    options = {"use_cache": False} if takes_use_cache(model) else {}
    return loss_of(model(input_ids=batch["input_ids"], labels=batch["labels"], **options))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Lets what the body builds have a dtype, as ``Trainer.init_module`` does."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
