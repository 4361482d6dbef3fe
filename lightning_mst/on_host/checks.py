"""What an optimizer on the host needs, found before a step is spent."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_mst.in_backward.optimizer import OptimizerInBackward
from lightning_mst.on_host.engine import DEVICES, device_type
from lightning_mst.ops.free_host_memory import free_host_memory
from lightning_mst.ops.host_memory import NotEnoughHostMemory
from lightning_mst.units import in_words

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

ADVICE = (
    "Train fewer weights (adapter=lora), take a smaller model or dtype, or keep the optimizer on the device"
    " (optimizer=adamw_in_backward, or adamw_8bit with states of a byte each)."
)
"""For when the host's memory does not suffice."""


def check_wrapped(optimizer: Optimizer) -> None:
    """Refuses an optimizer that the engine can't run one parameter at a time.

    Raises:
        ValueError: it is one.
    """
    name = type(optimizer).__name__
    closure = next(iter(inspect.signature(optimizer.step).parameters.values()), None)
    if closure is not None and closure.default is closure.empty and closure.kind is closure.POSITIONAL_OR_KEYWORD:
        raise ValueError(
            f"{name} runs the closure itself, several times in a step, and needs all parameters together. Use it"
            " without OptimizerOnHost, or choose one that treats each parameter by itself, such as AdamW."
        )
    if isinstance(optimizer, OptimizerInBackward):
        raise ValueError(
            "OptimizerOnHost and OptimizerInBackward both take gradients out of the backward pass. Keep one: on the"
            " host, gradients are freed during the backward pass as well."
        )


def check_device(parameters: Iterable[Tensor]) -> None:
    """Makes sure that the engine can work for them.

    Raises:
        ValueError: they are sharded, or not all on the one device that it works for.
    """
    parameters = list(parameters)
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise ValueError(
            "OptimizerOnHost works for one device, but these parameters are sharded over several. Use DeepSpeed there"
            " (strategy='mst_deepspeed_stage_3_offload'; in our program with optimizer=deepspeed_cpu_adam)."
        )
    expected, found = device_type(), sorted({str(parameter.device) for parameter in parameters})
    if len(found) != 1 or not found[0].startswith(expected or "none"):
        kinds = " or ".join(kind.upper() for kind in DEVICES)
        raise ValueError(
            f"OptimizerOnHost steps on the host what is trained on one {kinds} device. The parameters are on"
            f" {', '.join(found) or 'no device'}, and this machine has {f'a {expected}' if expected else 'no such'}"
            " device. Move the model there first, or use the optimizer itself (in our program, optimizer=adamw)."
        )


def host_bytes_of(parameters: Iterable[Tensor], make: Callable[..., Optimizer]) -> int:
    """What parameters take on the host: their copies, their gradients, and the optimizer's states.

    Args:
        parameters: those that go there.
        make: makes the optimizer of one parameter.
    """
    parameters = list(parameters)
    states = {dtype: _state_bytes(make, dtype) for dtype in {parameter.dtype for parameter in parameters}}
    return sum(round(p.numel() * (2 * p.itemsize + states[p.dtype])) for p in parameters)


def _state_bytes(make: Callable[..., Optimizer], dtype: torch.dtype) -> float:
    """Bytes of states for each number of a parameter: those of a small one after a step."""
    parameter = torch.zeros(64, 64, dtype=dtype, requires_grad=True)
    parameter.grad = torch.zeros_like(parameter)
    optimizer = make([parameter])
    optimizer.step()
    states = [state for state in optimizer.state[parameter].values() if isinstance(state, Tensor) and state.dim()]
    return sum(state.nbytes for state in states) / parameter.numel()


def check_room(parameters: Iterable[Tensor], needed: int) -> None:
    """Makes sure that the host has the memory, unless the parameters have no values and take none.

    Raises:
        NotEnoughHostMemory: it has less.
    """
    if any(isinstance(parameter, FakeTensor) for parameter in parameters):
        return
    available = free_host_memory()
    if needed > available:
        raise NotEnoughHostMemory(
            f"OptimizerOnHost needs {in_words(needed)} of the host's memory for weights, gradients and states, but"
            f" {in_words(available)} are free. {ADVICE}"
        )


def problems_of_trainer(trainer: Trainer, *, offload_gradients: bool) -> list[str]:
    """What a Trainer does that does not go with it, and what to set instead."""
    from lightning.pytorch.callbacks import GradientAccumulationScheduler
    from lightning.pytorch.strategies import SingleDeviceStrategy

    problems = []
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        problems.append(
            f"{type(trainer.strategy).__name__} (use one device with strategy='auto' or 'mst'; on several,"
            " strategy='mst_deepspeed_stage_3_offload', in our program with optimizer=deepspeed_cpu_adam)"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        problems.append(f"precision={trainer.precision!r}, which scales the loss (use 'bf16-mixed' or 'bf16-true')")
    if offload_gradients:
        advice = "(set it to 1, or offload_gradients=False; in our program, optimizer.offload_gradients=false)"
        if trainer.accumulate_grad_batches != 1:
            problems.append(f"accumulate_grad_batches={trainer.accumulate_grad_batches} {advice}")
        for callback in trainer.callbacks:
            if isinstance(callback, GradientAccumulationScheduler) and set(callback.scheduling.values()) != {1}:
                problems.append("GradientAccumulationScheduler (remove this callback, or set offload_gradients=False)")
    return problems
