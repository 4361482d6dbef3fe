"""How much a step computes in its MLPs, counted and not timed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mst.memory.attention import FlashAttention
from lightning_mst.memory.grouped_matmul import GroupedMatmul
from lightning_mst.memory.known_values import KnownValues
from lightning_mst.memory.layers import peaks_of
from lightning_mst.memory.places import Place
from lightning_mst.memory.rehearsal import Step, autocast_of, fake_batch
from lightning_mst.memory.tensor_bytes import Peak
from lightning_mst.rewrite.dataflow import ATTENTION
from lightning_mst.rewrite.discovery import find_layers
from lightning_mst.rewrite.shapes import linear_shape, true_shape
from lightning_mst.rewrite.structure import linear_layers

_MATMULS = {
    getattr(torch.ops.aten, name)
    for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_grouped_mm")
    if hasattr(torch.ops.aten, name)
}


def passes_of(model: nn.Module, step: Step, fake: FakeTensorMode) -> float:
    """Matmuls in the MLPs of a forward and backward pass, in units of those of one forward pass.

    3 without recomputation, as a matmul takes two more for its gradients; 3.67 if the up and gate projections of a
    gated MLP run once more in the backward pass; 4 if all of it does. Frozen weights take fewer: they have no gradient.

    Args:
        model: with fake weights, in train mode, rewritten or not.
        step: its batch and loss; optimizer and strategy have no part. Let it be short: all chunks are walked.
        fake: the mode of the weights.

    Returns:
        The passes; ``nan`` if the model has no MLPs in repeated layers.
    """
    shapes = _mlp_shapes(model)

    def run() -> dict[Place, Peak]:
        # Work is linear in the layers, as memory is, and is extended to all of them in the same way.
        forward, both = _count(model, step, fake, shapes)
        return {Place("forward", "", ""): Peak(forward, {}, 0), Place("backward", "", ""): Peak(both, {}, 0)}

    work = {role.phase: peak.total for role, peak in peaks_of(model, run).items()}
    return work["backward"] / work["forward"] if work["forward"] else math.nan


def _count(model: nn.Module, step: Step, fake: FakeTensorMode, shapes: set[tuple[int, int]]) -> tuple[int, int]:
    """Multiply-adds in the MLPs of the forward pass, and of forward and backward."""
    with ExitStack() as stack:
        stack.enter_context(fake)
        values = stack.enter_context(KnownValues(fake))
        stack.enter_context(GroupedMatmul())
        stack.enter_context(FlashAttention(kernel_workspace=False).used_by(model))
        batch = fake_batch(step.batch, fake, values)
        counter = stack.enter_context(_Matmuls(shapes))
        with autocast_of(step.autocast):
            loss = step.compute_loss(model, batch)
        forward = counter.total
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
    return forward, counter.total


class _Matmuls(TorchDispatchMode):
    """Counts the multiply-adds of matrix products two of whose three sizes are those of a given weight."""

    def __init__(self, shapes: set[tuple[int, int]]) -> None:
        super().__init__()
        self.total = 0
        self._shapes = [Counter(shape) for shape in shapes]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs the operator."""
        if func.overloadpacket in _MATMULS:
            # The sum that addmm adds to comes first; offsets of groups come last and have no second axis.
            first, second = [a for a in args if isinstance(a, Tensor) and a.dim() > 1][-2:]
            rows, inner, columns = first.shape[-2], first.shape[-1], second.shape[-1]
            sizes = Counter((rows, inner, columns))
            if any(shape <= sizes for shape in self._shapes):
                batch = first.shape[0] if first.dim() == second.dim() == 3 else 1
                self.total += batch * rows * inner * columns
        return func(*args, **(kwargs or {}))


def _mlp_shapes(model: nn.Module) -> set[tuple[int, int]]:
    """Sizes of the matrices of the layers' MLPs: those that another one leads back from, and experts'."""
    shapes: set[tuple[int, int]] = set()
    for _, layer in find_layers(model):
        names = {part: name for name, part in layer.named_modules()}
        linears = {linear_shape(part) for part in linear_layers(layer) if not ATTENTION.search(names[part])}
        own = {shape for shape in linears if shape is not None}
        for wide, narrow in own:  # down: I -> D
            if {(narrow, wide), (narrow, 2 * wide)} & own:
                shapes |= {(wide, narrow), *({(narrow, wide), (narrow, 2 * wide)} & own)}
        shapes |= {true_shape(p)[1:] for p in layer.parameters() if p.dim() == 3}
    return shapes
