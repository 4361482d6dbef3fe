"""The optimizer that users make."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary
from typing_extensions import override

from lightning_mst.on_host.checks import (
    ADVICE,
    check_device,
    check_room,
    check_wrapped,
    host_bytes_of,
    problems_of_trainer,
)
from lightning_mst.on_host.engine import Engine, offloading
from lightning_mst.ops.host_memory import NotEnoughHostMemory
from lightning_mst.units import in_words

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["OptimizerOnHost"]

# The hook of the optimizer that a parameter follows now.
_HOOKS = WeakTensorKeyDictionary()


class OptimizerOnHost(Optimizer):
    """Any optimizer, run by the host on weights and states in the host's memory; the engine is torchao's.

    The device keeps the weights alone. With N bytes of trained weights, the host holds 2 N (copies of the weights and
    their gradients, pinned; torch rounds each up to a power of two) and the states, which are another 2 N for AdamW:
    8 bytes in all for each bf16 weight.

    1. When backward has added up a weight's gradient, a hook copies it to the host, beside the rest of the pass.
    2. With ``offload_gradients`` the device's gradient is freed once it is copied.
    3. ``step(closure)`` runs the closure, steps each weight on the host as soon as its gradient is there, and copies
       the new weight back.

    The arithmetic is the wrapped optimizer's, in the dtype of the weights. Weights of fewer than ``minimal_size``
    numbers stay on the device, and so do their steps.

    To everyone else this is an ordinary optimizer: schedulers change its ``param_groups``, and its ``state_dict`` is
    the wrapped optimizer's, so that checkpoints go both ways. In its groups are the tensors that it steps, with their
    gradients: most are the host's copies. Lightning clips those. In a plain loop, clip ``optimizer.parameters()`` and
    not the model's, whose gradients are gone, or copied already.

    With ``offload_gradients``, a parameter that gets two gradients in one step raises an error: the second would
    replace the first on the host. It works on one device; on several, DeepSpeed does the same
    (``strategy="mst_deepspeed_stage_3_offload"``). With Lightning, call ``check_trainer`` once the optimizers exist.

    The weights on the host are what counts: values that are written into the model's from elsewhere while it trains
    are lost. A parameter follows the newest ``OptimizerOnHost`` that was made for it, until that one's ``remove()``:
    call it before the model goes on with an optimizer of another class.

    Args:
        params: parameters or parameter groups, on one CUDA or XPU device.
        optimizer: makes the wrapped optimizer of one parameter: a class of ``torch.optim`` or torchao, or a
            ``functools.partial`` of one. ``torch.optim.AdamW`` runs its fused kernel unless told otherwise.
        offload_gradients: free gradients in the backward pass.
        minimal_size: numbers of the smallest weight that goes to the host.
        **options: of the wrapped optimizer, such as ``lr``.

    Raises:
        ModuleNotFoundError: torchao is not installed.
        ValueError: the parameters are not on one device that the engine can work for.
        lightning_mst.ops.host_memory.NotEnoughHostMemory: the host has too little memory, or refuses to pin it. The
            message says how much it takes.

    Attributes:
        offload_gradients: as given.
        host_bytes: what it takes of the host's memory from the first step on.

    Example:
        >>> optimizer = OptimizerOnHost(model.parameters(), torch.optim.AdamW, lr=1e-5)
        >>> model(x).loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
        *,
        offload_gradients: bool = True,
        minimal_size: int = 4096,
        **options: Any,
    ) -> None:
        offloading()  # says what is missing, if it is
        if optimizer is torch.optim.AdamW:
            options.setdefault("fused", True)  # the default takes many passes over the host's memory, and temporaries
        make = partial(optimizer, **options)
        self.offload_gradients = offload_gradients
        wrapped = make([torch.zeros(1, requires_grad=True)])
        check_wrapped(wrapped)
        super().__init__(params, wrapped.defaults)

        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        large = [parameter for parameter in trained if parameter.numel() >= minimal_size]
        check_device(trained)
        self.host_bytes = host_bytes_of(large, make)
        check_room(large, self.host_bytes)
        try:
            self._engine = Engine(
                self.param_groups, make, offload_gradients=offload_gradients, minimal_size=minimal_size
            )
        except RuntimeError as error:
            raise NotEnoughHostMemory(
                f"The system refused a part of the {in_words(self.host_bytes)} of the host's memory that"
                f" OptimizerOnHost needs, pinned in large part: {error}\n{ADVICE} A container may limit what can be"
                " pinned (ulimit -l)."
            ) from error
        self._copies = self._engine.copies
        # A copy has its buffer as its gradient from when there is one in it until the end of the step.
        self._buffers = {parameter: copy.grad for parameter, copy in self._copies.items()}
        self._hooks = [_hook(parameter, self._on_gradient) for parameter in large]
        for group in self.param_groups:
            group["params"] = [self._copies.get(parameter, parameter) for parameter in group["params"]]
        self.zero_grad()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups, whose parameters have their gradients by the time they are handed out."""
        if hasattr(self, "_engine"):  # not yet in the constructor of the base class
            self._engine.wait()
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._groups = groups

    def parameters(self) -> list[Tensor]:
        """The tensors that are stepped, in the order of the parameters that they were made for."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @property
    def host_tensors(self) -> list[Tensor]:
        """The weights, gradients and states in the host's memory."""
        copies = set(self._copies.values())
        states = [state for each in self._engine.optimizers for copy, state in each.state.items() if copy in copies]
        values = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return [*copies, *self._buffers.values(), *values]

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Takes the groups of the constructor.

        Raises:
            NotImplementedError: later ones, for which the engine has no place.
        """
        if hasattr(self, "_engine"):
            raise NotImplementedError(
                "OptimizerOnHost takes no parameters later. Give it all groups at once, and freeze those that are to"
                " wait with requires_grad_(False) after that."
            )
        super().add_param_group(param_group)

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps what has a gradient, and puts the new weights into the model.

        Args:
            closure: computes the loss and calls backward.

        Returns:
            What the closure returned.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for parameter in self._copies:
            if parameter.grad is not None and parameter not in self._engine.waiting:  # it was set by hand
                self._on_gradient(parameter)
        options = {
            parameter: {key: value for key, value in group.items() if key != "params"}
            for group in self._groups
            for parameter in group["params"]
        }
        groups = [group for optimizer in self._engine.optimizers for group in optimizer.param_groups]
        for group in groups:
            group.update(options[group["params"][0]])
        self._engine.step()
        for group in groups:
            changed = [key for key, value in options[group["params"][0]].items() if value is not group[key]]
            if changed:
                raise RuntimeError(
                    "The optimizer keeps state of all parameters together in its parameter groups"
                    f" ({', '.join(changed)}), so it can't step one at a time. Use it without OptimizerOnHost."
                )
        return result

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all gradients, and begins a step; they are ``None`` whatever ``set_to_none`` says."""
        for parameter in (*self._copies, *self.parameters()):
            parameter.grad = None
        self._engine.waiting.clear()

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state dict that the wrapped optimizer would have on the same parameters."""
        states: dict[Tensor, Any] = {}
        for optimizer in self._engine.optimizers:
            states.update(optimizer.state)
        places = {parameter: place for place, parameter in enumerate(self.parameters())}
        return {**super().state_dict(), "state": {places[parameter]: state for parameter, state in states.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer, or of the wrapped one on the same parameters."""
        super().load_state_dict({**state_dict, "state": {}})
        places = {parameter: place for place, parameter in enumerate(self.parameters())}
        for optimizer in self._engine.optimizers:
            found = [state_dict["state"].get(places[p]) for group in optimizer.param_groups for p in group["params"]]
            state = {place: state for place, state in enumerate(found) if state is not None}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

    def remove(self) -> None:
        """Leaves the backward pass; weights and states stay on the host for ``state_dict`` while this object lives."""
        while self._hooks:
            self._hooks.pop().remove()

    def check_trainer(self, trainer: Trainer) -> None:
        """Refuses what does not go with it.

        Args:
            trainer: after it has set up its strategy, as in ``on_fit_start``.

        Raises:
            MisconfigurationException: it trains on several devices, scales the loss, or accumulates gradients that are
                not kept. The message names all that is wrong.
        """
        from lightning.pytorch.utilities.exceptions import MisconfigurationException

        problems = problems_of_trainer(trainer, offload_gradients=self.offload_gradients)
        if problems:
            raise MisconfigurationException(
                f"OptimizerOnHost takes gradients to the host one by one, which does not go with {'; '.join(problems)}."
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Of load_state_dict, which writes past properties.
        self.param_groups = state.pop("param_groups")
        super().__setstate__(state)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "OptimizerOnHost can't be copied or pickled: its hooks belong to its parameters. Save its state_dict() and"
            " load it into a new one."
        )

    def _on_gradient(self, parameter: Tensor) -> None:
        if self.offload_gradients and parameter in self._engine.waiting:
            raise RuntimeError(
                f"A parameter of shape {tuple(parameter.shape)} got a second gradient in one step, which would replace"
                " the first on the host. Call step() and zero_grad() after each backward pass, or set"
                " offload_gradients=False to accumulate gradients on the device."
            )
        self._copies[parameter].grad = self._buffers[parameter]
        self._engine.begin_copy(parameter)


def _hook(parameter: Tensor, on_gradient: Callable[[Tensor], None]) -> RemovableHandle:
    if (before := _HOOKS.pop(parameter, None)) is not None:
        before.remove()
    _HOOKS[parameter] = handle = parameter.register_post_accumulate_grad_hook(on_gradient)
    return handle
