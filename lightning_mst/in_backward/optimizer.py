"""The optimizer that users make."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mst.in_backward.all_reduce import AllReduce
from lightning_mst.in_backward.checks import (
    check_optimizer,
    modules_of,
    problems_of_model,
    problems_of_trainer,
    refusal,
)
from lightning_mst.in_backward.stepper import Stepper

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["OptimizerInBackward"]


class OptimizerInBackward(Optimizer):
    """Any optimizer, run in the backward pass: gradients take O(largest parameter) memory, not O(all parameters).

    The paper's setting: the gradients of its tables 8 and 9 (Llama-3-8B, bf16) are 15 GB. Its optimizer states in bf16
    are simply those of AdamW on bf16 weights.

    1. When backward has added up a parameter's gradient, from all of its uses, a hook steps this parameter alone.
    2. The gradient is freed at once.
    3. ``step(closure)`` runs the closure, and with it forward, backward and all the updates. It also steps whatever
       has a gradient by then, such as one that was set by hand, so ``step()`` after ``loss.backward()`` is right, too.

    The weights are, bit for bit, those of the wrapped optimizer, because it treats each parameter by itself. One that
    does not is refused: at construction if its ``step`` needs a closure (LBFGS), at the first backward if it keeps
    state in its parameter groups (Prodigy, schedule-free). To everyone else this is an ordinary optimizer: schedulers
    change its ``param_groups``, and its ``state_dict`` is the wrapped optimizer's, so that checkpoints go both ways.

    Call ``step`` (or ``zero_grad``) between two backward passes; a parameter that gets two gradients in one step
    raises an error, because accumulated gradients would be needed whole. So would gradients that are clipped by their
    norm, or unscaled (fp16): in a plain loop ``clip_grad_norm_``, like all that reads gradients after backward, finds
    none, and ``GradScaler`` raises.

    With several processes:

    * FSDP2 (``fully_shard``): shards are stepped once they are reduced.
    * DDP: call ``attach(model)`` with the wrapped model, and gradients are stepped behind each bucket's all-reduce.
      DDP keeps its buckets, which are as large as all gradients; what is saved, from the second step on, is the copy
      beside them (which ``gradient_as_bucket_view=True`` saves as well).

    With Lightning, call ``connect(trainer)`` once the optimizers exist; it does all that, and checks the settings.

    A parameter follows the newest ``OptimizerInBackward`` that was made for it, until that one's ``remove()``: call it
    before the model goes on with another optimizer.
    Per-parameter options of bitsandbytes' ``GlobalOptimManager``, which go by position, do not carry over.

    Args:
        params: parameters, named parameters or parameter groups, as for any optimizer.
        optimizer: makes the wrapped optimizer, called as ``optimizer(params, **options)``: a class of
            ``torch.optim``, bitsandbytes, torchao, ..., or a ``functools.partial`` of one.
        **options: of the wrapped optimizer, such as ``lr``.

    Raises:
        TypeError: ``optimizer`` does not make an optimizer.
        ValueError: the optimizer can't work on one parameter at a time.

    Attributes:
        wrapped: the wrapped optimizer, which holds groups and state. Hooks on state dicts belong there. Don't step it.

    Example:
        >>> optimizer = OptimizerInBackward(model.parameters(), torch.optim.AdamW, lr=1e-3)
        >>> model(x).loss.backward()  # steps
        >>> optimizer.step()  # ends the step
    """

    def __init__(self, params: Iterable[Any], optimizer: Callable[..., Optimizer], **options: Any) -> None:
        self.wrapped = optimizer(params, **options)
        if isinstance(self.wrapped, OptimizerInBackward):
            raise ValueError("This is an OptimizerInBackward already. Name the optimizer itself, such as AdamW.")
        check_optimizer(self.wrapped)
        # Everything that changes lives in there: Lightning calls this class's methods on a wrapper of the instance.
        self._stepper = Stepper(self.wrapped)
        groups, state = self.wrapped.param_groups, self.wrapped.state
        super().__init__(groups, self.wrapped.defaults)  # starts with empty ones, and adds the groups again
        self.param_groups, self.state = groups, state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's groups; what a scheduler writes there counts for the next backward pass."""
        return self.wrapped.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.wrapped.param_groups = groups

    @property
    def state(self) -> dict[Tensor, Any]:
        """The wrapped optimizer's state."""
        return self.wrapped.state

    @state.setter
    def state(self, state: dict[Tensor, Any]) -> None:
        self.wrapped.state = state

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, which are stepped from the next backward pass on."""
        self.wrapped.add_param_group(param_group)
        for parameter in self.wrapped.param_groups[-1]["params"]:
            self._stepper.take(parameter, len(self.wrapped.param_groups) - 1)

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Ends a step; with a closure, runs it first.

        Args:
            closure: computes the loss and calls backward, which does the updates.

        Returns:
            What the closure returned.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self._stepper.finish()
        return result

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients that are left, and begins a step."""
        super().zero_grad(set_to_none)
        self._stepper.begin()

    @override
    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict."""
        return self.wrapped.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer, or of the wrapped one on the same parameters."""
        self.wrapped.load_state_dict(state_dict)

    def attach(self, model: nn.Module) -> None:
        """Says which model makes the gradients, if there are several processes.

        Under DDP the steps move behind the all-reduce. Any other model is taken to deliver complete gradients, as
        FSDP2, tensor parallelism and a model on one device do.

        Args:
            model: as it is called in training, that is, after it was wrapped.

        Raises:
            ValueError: the model is wrapped in a way that does not go with steps in the backward pass.
        """
        problems = problems_of_model(model)
        if problems:
            raise ValueError(refusal(problems))
        for module in modules_of(model, DistributedDataParallel):
            self._stepper.follow(AllReduce.of(module))
        self._stepper.gradients_are_complete = True

    def remove(self) -> None:
        """Leaves the backward pass: gradients stay, and ``step`` steps them like the wrapped optimizer's."""
        self._stepper.remove()

    def check_trainer(self, trainer: Trainer) -> None:
        """Refuses what needs all gradients at a time.

        Args:
            trainer: after it has set up its strategy, as in ``on_fit_start``.

        Raises:
            MisconfigurationException: it clips, accumulates or unscales gradients, or distributes the model in a way
                that does not go with steps in the backward pass. The message names all that is wrong.
        """
        from lightning.pytorch.utilities.exceptions import MisconfigurationException

        problems = problems_of_trainer(trainer)
        if problems:
            raise MisconfigurationException(refusal(problems))

    def connect(self, trainer: Trainer) -> None:
        """``check_trainer``, then ``attach`` to the strategy's model: all that Lightning needs, in ``on_fit_start``."""
        self.check_trainer(trainer)
        self.attach(trainer.strategy.model)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "OptimizerInBackward can't be copied or pickled: its hooks belong to its parameters. Save its "
            "state_dict() and load it into a new one."
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.wrapped!r}"
