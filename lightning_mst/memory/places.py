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

OUTSIDE = "outside the blocks"
"""The block of what happens in none, such as a loss over whole logits."""


class Place(NamedTuple):
    """A place in a training step.

    Attributes:
        phase: ``"forward"``, ``"backward"`` (with what is recomputed for it) or ``"optimizer"``.
        block: the module's dotted name, or ``OUTSIDE``.
    """

    phase: Phase
    block: str

    def __str__(self) -> str:
        """``backward of model.layers.3.mlp``."""
        if self.phase == "optimizer":
            return "optimizer step"
        return f"{self.phase} {'' if self.block == OUTSIDE else 'of '}{self.block}"


def blocks_of(model: nn.Module) -> dict[nn.Module, str]:
    """The modules that are places of their own: the layers, their children, and what has weights outside of layers."""
    layers = find_layers(model)
    blocks = {layer: name for name, layer in layers}
    blocks |= {child: f"{name}.{key}" for name, layer in layers for key, child in layer.named_children()}
    inside = {part for _, layer in layers for part in layer.modules()}
    for name, module in model.named_modules():
        if name and module not in inside and any(True for _ in module.parameters(recurse=False)):
            blocks[module] = name
    return blocks


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

    def __init__(self, blocks: Mapping[nn.Module, str]) -> None:
        self._blocks = blocks
        self._phase: Phase = "forward"
        self._calls: list[str] = []
        self._gradient_at = OUTSIDE
        self._before_step: list[Phase] = []
        self.on_change: Callable[[], None] = lambda: None

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self.on_change()
        self._phase, self._gradient_at = phase, OUTSIDE
        self._calls.clear()

    @property
    def now(self) -> Place:
        """The current place."""
        if self._phase == "optimizer":
            return Place(self._phase, OUTSIDE)
        if self._calls:
            return Place(self._phase, self._calls[-1])
        return Place(self._phase, self._gradient_at if self._phase == "backward" else OUTSIDE)

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
        name = self._blocks.get(module)
        if name is not None:
            self.on_change()
            self._calls.append(name)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._blocks.get(module)
        if name is None:
            return
        self.on_change()
        if name in self._calls:
            # Whatever it called is over, too, also what ended without a word.
            del self._calls[len(self._calls) - 1 - self._calls[::-1].index(name) :]
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DeferredTensor) and tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(lambda _: self._arrive(name))
                break

    def _arrive(self, name: str) -> None:
        self.on_change()
        self._gradient_at = name

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


__all__ = ["OUTSIDE", "Phase", "Place", "Places", "blocks_of"]

