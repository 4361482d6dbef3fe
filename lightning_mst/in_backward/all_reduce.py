"""DDP: steps behind the all-reduce of a bucket of gradients."""

# No `from __future__ import annotations`: DDP compares its hook's annotations with types, and would get strings.
import weakref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from lightning_mst.in_backward.checks import refusal
from lightning_mst.in_backward.stepper import Stepper


class AllReduce:
    """A DDP model's communication hook: averages a bucket of gradients, then lets their optimizers step.

    While a bucket is on its way, backward computes the next one; then the first is waited for. So communication
    overlaps with computation, and all steps run on the thread and the stream of the backward pass.

    Args:
        model: gets the hook.

    Raises:
        ValueError: it has one already.
    """

    _existing: weakref.WeakKeyDictionary[nn.Module, "AllReduce"] = weakref.WeakKeyDictionary()

    def __init__(self, model: DistributedDataParallel) -> None:
        self._process_group = model.process_group
        self._steppers: dict[Tensor, Stepper | None] = {
            parameter: None
            for name, parameter in model.module.named_parameters()
            if parameter.requires_grad and name not in model.parameters_to_ignore
        }
        self._on_their_way: list[tuple[torch.futures.Future[torch.Tensor], list[tuple[Tensor, Tensor]]]] = []
        try:
            model.register_comm_hook(None, self.reduce)
        except RuntimeError as error:
            raise ValueError(
                refusal([f"a communication hook of DDP's own ({error}); drop it (in Lightning, ddp_comm_hook)"])
            ) from error
        # The only way to tell DDP not to write the averages into new gradients at the end of backward. DDP does the
        # same for torch's own optimizers in backward, which are not public.
        model.reducer._set_optimizer_in_backward()

    @classmethod
    def of(cls, model: DistributedDataParallel) -> "AllReduce":
        """The hook of a model, which several optimizers share."""
        if model not in cls._existing:
            cls._existing[model] = cls(model)
        return cls._existing[model]

    def give(self, parameter: Tensor, stepper: Stepper) -> bool:
        """Lets a parameter follow a stepper, if its gradient is reduced here at all."""
        if parameter not in self._steppers:
            return False
        self._steppers[parameter] = stepper
        return True

    def take_back(self, stepper: Stepper) -> None:
        """Lets a stepper's parameters keep their gradients again."""
        for parameter, current in self._steppers.items():
            if current is stepper:
                self._steppers[parameter] = None

    def reduce(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """The hook itself."""
        if bucket.index() == 0:
            self._on_their_way.clear()  # of a backward pass that failed
        future = allreduce_hook(self._process_group, bucket)
        self._on_their_way.append((future, list(zip(bucket.parameters(), bucket.gradients(), strict=True))))
        while len(self._on_their_way) > (0 if bucket.is_last() else 1):
            self._arrive(*self._on_their_way.pop(0))
        return future

    def _arrive(self, future: torch.futures.Future[torch.Tensor], gradients: list[tuple[Tensor, Tensor]]) -> None:
        future.wait()
        for parameter, gradient in gradients:
            stepper = self._steppers[parameter]
            if stepper is not None:
                parameter.grad = gradient
                stepper.step(parameter)
            else:  # another optimizer's: it gets what DDP would have written
                assert parameter.grad is not None
                parameter.grad.copy_(gradient)
