"""What does not go with steps in the backward pass."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def check_optimizer(optimizer: Any) -> None:
    """Refuses an optimizer that can't step one parameter at a time, as far as its looks tell."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"OptimizerInBackward wraps torch.optim.Optimizer objects, but got {name} from `optimizer`.")
    closure = next(iter(inspect.signature(optimizer.step).parameters.values()), None)
    if closure is not None and closure.default is closure.empty and closure.kind is closure.POSITIONAL_OR_KEYWORD:
        raise ValueError(
            f"{name} runs the closure itself, several times in a step, and needs all gradients together. Use it "
            "without OptimizerInBackward, or choose one that treats each parameter by itself, such as AdamW."
        )


def refusal(problems: list[str]) -> str:
    """The message that names all of them."""
    return (
        f"OptimizerInBackward uses and frees gradients during backward, which does not go with {'; '.join(problems)}."
    )


def modules_of(model: nn.Module, kind: type[nn.Module]) -> list[Any]:
    """The modules of a class."""
    return [module for module in model.modules() if isinstance(module, kind)]


def problems_of_model(model: nn.Module) -> list[str]:
    """How a model is distributed that does not go with it."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    problems = []
    if modules_of(model, FullyShardedDataParallel):
        problems.append("FullyShardedDataParallel (use FSDP2's fully_shard)")
    for ddp in modules_of(model, DistributedDataParallel):
        # Both let a parameter go unused, which the bucket then shows as a gradient of zeros, and AdamW still decays it.
        for option in ("find_unused_parameters", "static_graph"):
            if getattr(ddp, option):
                problems.append(f"DDP's {option}=True (set it to False, and freeze what is not trained)")
    return problems


def problems_of_trainer(trainer: Trainer) -> list[str]:
    """What a Trainer does with gradients that does not go with it, and what to set instead."""
    from lightning.pytorch.callbacks import GradientAccumulationScheduler
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
    from lightning.pytorch.utilities.model_helpers import is_overridden

    problems = []
    if trainer.gradient_clip_val:
        problems.append(
            f"gradient_clip_val={trainer.gradient_clip_val} (set it to None; in our program, "
            "trainer.gradient_clip_val=null)"
        )
    if is_overridden("configure_gradient_clipping", trainer.lightning_module):
        problems.append("a configure_gradient_clipping of the LightningModule's own (remove it)")
    if trainer.accumulate_grad_batches != 1:
        problems.append(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} (set it to 1, and make the batch larger: "
            "mini-sequences make room)"
        )
    for callback in trainer.callbacks:
        if isinstance(callback, GradientAccumulationScheduler) and set(callback.scheduling.values()) != {1}:
            problems.append("GradientAccumulationScheduler (remove this callback)")
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        problems.append(f"precision={trainer.precision!r}, which scales the loss (use 'bf16-mixed' or 'bf16-true')")
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)):
        problems.append(f"{type(trainer.strategy).__name__} (use one device, DDPStrategy or ModelParallelStrategy)")
    elif isinstance(trainer.strategy.model, nn.Module):
        problems += problems_of_model(trainer.strategy.model)
    return problems
