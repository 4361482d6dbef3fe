"""Step each parameter during the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mst.program.errors import ConfigurationError

__all__ = ["OptimizerInBackward"]


class OptimizerInBackward(Optimizer):
    """Updates a parameter as soon as its gradient is complete, and frees the gradient at once.

    O(parameters) bytes of gradients -> O(largest parameter). In the paper's tables 8 and 9 (Llama-3-8B, bf16) these
    are 15 GB. The result is that of the same optimizer on all parameters: AdamW, SGD and the like never look at
    more than one parameter at a time.

    1. Each parameter gets an optimizer of its own, called by a post-accumulate-grad hook. That hook runs once per
       backward pass, after all uses of the parameter (tied weights) have added their share.
    2. ``step`` only runs the closure: forward and backward, and with it the updates.
    3. State and hyper-parameters live in this object, so checkpoints and learning rate schedulers work as usual.

    What needs all gradients at a time is impossible: clipping by norm, gradient accumulation, loss scaling, and
    averaging over processes. :meth:`check_trainer` refuses them.

    Args:
        params: Parameters to train, in one group.
        optimizer_class: Optimizer for each of them.
        **options: Of that optimizer, such as ``lr``.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, optimizer_class: type[Optimizer] = torch.optim.AdamW, **options: Any
    ) -> None:
        parameters = list(params)
        self._optimizers = {parameter: optimizer_class([parameter], **options) for parameter in parameters}
        defaults = next(iter(self._optimizers.values())).defaults if self._optimizers else options
        super().__init__(parameters, defaults)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._step_one)

    def _step_one(self, parameter: nn.Parameter) -> None:
        optimizer = self._optimizers[parameter]
        # Taken from here each time: schedulers change the group, loading a checkpoint replaces the state.
        group = {key: value for key, value in self.param_groups[0].items() if key != "params"}
        optimizer.param_groups[0].update(group)
        optimizer.state = self.state
        optimizer.step()
        parameter.grad = None

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run forward and backward, which do all the work; nothing is left to do when they have run already."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def check_trainer(self, trainer: pl.Trainer) -> None:
        """Refuse what cannot work with gradients that are gone before the backward pass is over.

        Raises:
            ConfigurationError: The trainer clips gradients, accumulates them, scales the loss or has several processes.
        """
        wrong = {
            f"trainer.gradient_clip_val={trainer.gradient_clip_val} (set it to null)": trainer.gradient_clip_val,
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} (set it to 1)": (
                trainer.accumulate_grad_batches != 1
            ),
            f"{trainer.world_size} processes (use one device)": trainer.world_size > 1,
            "precision=16-mixed (use bf16-mixed or bf16-true)": getattr(trainer.precision_plugin, "scaler", None),
        }
        found = [text for text, is_wrong in wrong.items() if is_wrong]
        if found:
            raise ConfigurationError(f"An optimizer in the backward pass does not go with {', '.join(found)}")
