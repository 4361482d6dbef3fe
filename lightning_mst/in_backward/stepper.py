"""Steps one parameter at a time, when its gradient is complete."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from lightning_mst.in_backward.all_reduce import AllReduce

# The hook of the optimizer that a parameter follows now; neither keeps the other, or the optimizer, alive.
_HOOKS = WeakTensorKeyDictionary()


class Stepper:
    """Steps one parameter at a time."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.gradients_are_complete = False
        self._groups: dict[Tensor, int] = {}  # by position: a loaded checkpoint replaces the dictionaries
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._all_reduces: list[AllReduce] = []
        self._stepped: set[Tensor] = set()
        self._lock = threading.Lock()  # a model on several devices has a backward thread for each

    def take(self, parameter: Tensor, group: int) -> None:
        """Steps the parameter from now on, if it is trained; ``finish`` looks after one that is thawed later."""
        self._groups[parameter] = group
        if not parameter.requires_grad:
            return
        _drop_hook(parameter)
        if not any(each.give(parameter, self) for each in self._all_reduces):
            handle = parameter.register_post_accumulate_grad_hook(self._on_gradient)
            self._hooks[parameter] = _HOOKS[parameter] = handle

    def follow(self, all_reduce: AllReduce) -> None:
        """Steps the parameters of a DDP model behind its all-reduce, where their gradients are complete."""
        if all_reduce not in self._all_reduces:
            self._all_reduces.append(all_reduce)
        for parameter in self._groups:
            if all_reduce.give(parameter, self):
                _drop_hook(parameter)

    def remove(self) -> None:
        """Steps no parameter any more."""
        for parameter, handle in self._hooks.items():
            handle.remove()
            # What is left would be a weak reference, with which torch refuses to move a sharded weight.
            if _HOOKS.get(parameter) is handle:
                del _HOOKS[parameter]
        for all_reduce in self._all_reduces:
            all_reduce.take_back(self)
        self._hooks, self._all_reduces = {}, []

    def begin(self) -> None:
        """Lets every parameter be stepped again."""
        self._stepped.clear()

    def finish(self) -> None:
        """Steps what has a gradient still."""
        if any(parameter.grad is not None for parameter in self._groups):
            self.optimizer.step()
        self.begin()

    def step(self, parameter: Tensor) -> None:
        """Steps one parameter and frees its gradient."""
        with self._lock:
            if parameter in self._stepped:
                raise RuntimeError(
                    f"A parameter of shape {tuple(parameter.shape)} got a second gradient in one step, but "
                    "OptimizerInBackward has already used and freed the first. Call step() after each backward pass, "
                    "without gradient accumulation, and checkpoint activations with use_reentrant=False."
                )
            self._stepped.add(parameter)
            groups = self.optimizer.param_groups
            group = groups[self._groups[parameter]]
            alone = {**group, "params": [parameter]}
            self.optimizer.param_groups = [alone]
            try:
                self.optimizer.step()
            finally:
                self.optimizer.param_groups = groups
            changed = [key for key, value in alone.items() if key != "params" and value is not group.get(key)]
            if changed:
                raise RuntimeError(
                    f"{type(self.optimizer).__name__} keeps state of all parameters together in its parameter groups "
                    f"({', '.join(changed)}), so it can't step one at a time. Use it without OptimizerInBackward."
                )
            parameter.grad = None

    def _on_gradient(self, parameter: Tensor) -> None:
        if not self.gradients_are_complete and _is_part_of_many(parameter):
            raise RuntimeError(
                "OptimizerInBackward can't know whether the gradients of this process are the average over all "
                f"{dist.get_world_size()}. Call attach(model) with the DDP-wrapped (or otherwise distributed) model "
                "after the optimizer is made; with Lightning, connect(trainer), as MSTCallback does."
            )
        self.step(parameter)


def _drop_hook(parameter: Tensor) -> None:
    handle = _HOOKS.pop(parameter, None)
    if handle is not None:
        handle.remove()


def _is_part_of_many(parameter: Tensor) -> bool:
    """Whether there are other processes, and nothing about the parameter shows that it shares its gradient."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    from torch.distributed.tensor import DTensor

    return not isinstance(parameter, DTensor)
