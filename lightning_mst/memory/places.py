"""Where in a training step a program is: which pass, and which block of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from lightning_mst.ops.deferred_tensor import DeferredTensor
from lightning_mst.rewrite.discovery import find_layers

Phase = Literal["forward", "backward", "optimizer"]


class Place(NamedTuple):
    """A place in a training step.

    Attributes:
        phase: ``"forward"``, ``"backward"`` (with what is recomputed for it) or ``"optimizer"``.
        layer: the layer's dotted name, or ``""`` outside of the layers.
        block: the block's name, within its layer where there is one; ``""`` for what happens in none, such as the
            residual sums of a layer or a loss over whole logits.
    """

    phase: Phase
    layer: str
    block: str

    @property
    def unit(self) -> tuple[str, str]:
        """The pass through a whole layer, or through a block outside of the layers, that this is part of."""
        return self.phase, self.layer or self.block

    def __str__(self) -> str:
        """For example ``backward of model.layers.3, mlp``."""
        if self.phase == "optimizer":
            return "optimizer step"
        return f"{self.phase} of {', '.join(filter(None, (self.layer, self.block))) or 'the loss'}"


Where = tuple[str, str]
"""A place without its phase: layer and block."""


def blocks_of(model: nn.Module) -> dict[nn.Module, Where]:
    """The modules that are places of their own: the layers, their children, and what has weights outside of layers."""
    layers = find_layers(model)
    blocks = {layer: (name, "") for name, layer in layers}
    blocks |= {child: (name, key) for name, layer in layers for key, child in layer.named_children()}
    inside = {part for _, layer in layers for part in layer.modules()}
    for name, module in model.named_modules():
        if name and module not in inside and any(True for _ in module.parameters(recurse=False)):
            blocks[module] = ("", name)
    return blocks


_NOWHERE: Where = ("", "")


class Places:
    """Follows a training step through the model.

    In the forward pass a block begins and ends with its call. In the backward pass it begins where the gradient of its
    output arrives, and lasts until the next block's; a call in between, which recomputes something, counts for the
    block that is called. Who runs the step sets the phase; a step of an optimizer inside the backward pass is noticed.

    Args:
        blocks: the modules that are places, with their names.

    Attributes:
        phase: the current phase.
        on_change: called before the place changes.
    """

    def __init__(self, blocks: Mapping[nn.Module, Where]) -> None:
        self._blocks = blocks
        self._phase: Phase = "forward"
        self._calls: list[Where] = []
        self._gradient_at: Where = _NOWHERE
        self._before_step: list[Phase] = []
        self.on_change: Callable[[], None] = lambda: None

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self.on_change()
        self._phase, self._gradient_at = phase, _NOWHERE
        self._calls.clear()

    @property
    def now(self) -> Place:
        """The current place."""
        if self._phase == "optimizer":
            return Place(self._phase, *_NOWHERE)
        if self._calls:
            return Place(self._phase, *self._calls[-1])
        return Place(self._phase, *(self._gradient_at if self._phase == "backward" else _NOWHERE))

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follows what runs in the body."""
        with ExitStack() as stack:
            for handle in (
                register_module_forward_pre_hook(self._enter),
                # Also after an exception: checkpointing ends a recomputation by one.
                register_module_forward_hook(self._leave, always_call=True),
                register_optimizer_step_pre_hook(self._begin_step),
                register_optimizer_step_post_hook(self._end_step),
            ):
                stack.callback(handle.remove)
            yield

    def _enter(self, module: nn.Module, args: Any) -> None:
        where = self._blocks.get(module)
        if where is not None:
            self.on_change()
            self._calls.append(where)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        where = self._blocks.get(module)
        if where is None:
            return
        self.on_change()
        if where in self._calls:
            # Whatever it called is over, too, also what ended without a word.
            del self._calls[len(self._calls) - 1 - self._calls[::-1].index(where) :]
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DeferredTensor) and tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(lambda _: self._arrive(where))
                break

    def _arrive(self, where: Where) -> None:
        self.on_change()
        self._gradient_at = where

    def _begin_step(self, *_: Any) -> None:
        # One that is given a closure begins before the forward pass and is not meant.
        self._before_step.append(self._phase)
        if self._phase == "backward":
            self.on_change()
            self._phase = "optimizer"

    def _end_step(self, *_: Any) -> None:
        before = self._before_step.pop()
        if before == "backward":
            self.on_change()
            self._phase = before
