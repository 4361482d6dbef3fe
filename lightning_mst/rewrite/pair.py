"""An MLP that is no module: two linear layers that a layer's forward calls one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lightning_mst.ops.chunking import mlp_num_chunks
from lightning_mst.ops.deferred_activation import DeferredActivation, defer_activation
from lightning_mst.rewrite.shadow import form_of, original_forward, shadow_method
from lightning_mst.rewrite.structure import linear_shape


@dataclass
class _FirstForm:
    chunks: int | str


@dataclass
class _SecondForm:
    # What the second projection was last called with, for whoever tries whether the pair is one.
    met: bool = False


def rewrite_pair(first: nn.Module, second: nn.Module, chunks: int | str) -> None:
    """Lets ``second(pointwise(first(x)))`` run over mini-sequences, wherever it is called.

    Args:
        first: the up projection, a linear layer of (..., D).
        second: the down projection, a linear layer of (..., I).
        chunks: M, ``"auto"`` or ``"paper"``.
    """
    shadow_method(first, _first_forward, _FirstForm(chunks))
    shadow_method(second, _second_forward, _SecondForm())


def is_pair(second: nn.Module) -> bool:
    """Whether a rewritten down projection was called with the activation of its up projection, unspoilt."""
    form: _SecondForm = form_of(second)
    return form.met


def _first_forward(self: nn.Module, x: Tensor) -> Tensor:
    form: _FirstForm = form_of(self)
    shape = linear_shape(self)
    assert shape is not None
    hidden_size, width = shape
    num_chunks = mlp_num_chunks(form.chunks, num_tokens=x.numel() // max(1, hidden_size), hidden_size=hidden_size)
    project = original_forward(self)
    if num_chunks == 1:
        return project(x)
    return defer_activation(project, x, width=width, parameters=self.parameters(), num_chunks=num_chunks)


def _second_forward(self: nn.Module, x: Tensor) -> Tensor:
    project = original_forward(self)
    if not isinstance(x, DeferredActivation):
        return project(x)
    form_of(self).met = not x.was_computed
    return x.finish(project, self.parameters())
