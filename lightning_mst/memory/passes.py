"""How much a step computes in each part of a model, counted and not timed."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
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
from lightning_mst.ops.chunking import chunk_bounds
from lightning_mst.ops.head_chunks import WEIGHT_SLICES
from lightning_mst.rewrite.dataflow import ATTENTION
from lightning_mst.rewrite.discovery import find_layers
from lightning_mst.rewrite.shapes import linear_shape, true_shape
from lightning_mst.rewrite.structure import linear_layers

_MATMULS = {
    getattr(torch.ops.aten, name)
    for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_grouped_mm")
    if hasattr(torch.ops.aten, name)
}
_KERNELS = {torch.ops.lightning_mst.flash_attention: 2, torch.ops.lightning_mst.flash_attention_backward: 5}
"""The stand-ins for attention's kernels, and how many matmuls they are."""

Shapes = dict[str, set[tuple[int, int]]]


@dataclass(frozen=True)
class Passes:
    """Matmuls of a forward and backward pass by part, each in units of those of one forward pass of that part.

    3 without recomputation, as a matmul takes two more for its gradients, and 3.5 for attention, whose backward pass
    has five matmuls for the two of its forward pass (arXiv 2307.08691). 4 and 4.5 if all of it runs once more in the
    backward pass; 3.67 if of a gated MLP the up and gate projections do. Frozen weights take fewer: they have no
    gradient. ``nan`` for a part that the model does not have.

    Attributes:
        mlp: of the MLPs and experts of repeated layers.
        projection: of the other linear layers in them: those around attention.
        attention: of the scores and the sums of values.
        lm_head: of the LM head.
    """

    mlp: float
    projection: float
    attention: float
    lm_head: float


def passes_of(model: nn.Module, step: Step, fake: FakeTensorMode) -> Passes:
    """Counts the matmuls of a forward and backward pass.

    Args:
        model: with fake weights, in train mode, rewritten or not.
        step: its batch and loss; optimizer and strategy have no part. Let it be short: all chunks are walked.
        fake: the mode of the weights.

    Returns:
        The passes.
    """
    shapes = _shapes_in_layers(model)
    # A small head's slices may have the shape of a layer's weight, which then has the right to it.
    shapes["lm_head"] = _shapes_of_heads(model) - shapes["mlp"] - shapes["projection"]

    def run() -> dict[Place, Peak]:
        # Work is linear in the layers, as memory is, and is extended to all of them in the same way.
        forward, both = _count(model, step, fake, shapes)
        return {Place("forward", "", ""): Peak(0, forward, 0), Place("backward", "", ""): Peak(0, both, 0)}

    work = {role.phase: peak.kinds for role, peak in peaks_of(model, run).items()}

    def of(part: str) -> float:
        forward = work["forward"].get(part, 0)
        return work["backward"].get(part, 0) / forward if forward else math.nan

    return Passes(mlp=of("mlp"), projection=of("projection"), attention=of("attention"), lm_head=of("lm_head"))


def _count(
    model: nn.Module, step: Step, fake: FakeTensorMode, shapes: Shapes
) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Work in each part in a forward pass alone, and in forward and backward."""
    with ExitStack() as stack:
        stack.enter_context(fake)
        values = stack.enter_context(KnownValues(fake))
        stack.enter_context(GroupedMatmul())
        stack.enter_context(FlashAttention(kernel_workspace=False).used_by(model))
        batch = fake_batch(step.batch, fake, values)
        # The head in mini-sequences computes its gradients in the forward pass, if there is to be a backward pass.
        with torch.no_grad(), _Matmuls(shapes) as forward, autocast_of(step.autocast):
            step.compute_loss(model, batch)
        with _Matmuls(shapes) as both:
            with autocast_of(step.autocast):
                loss = step.compute_loss(model, batch)
            loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
    return forward.work, both.work


class _Matmuls(TorchDispatchMode):
    """Counts the multiply-adds of matrix products two of whose three sizes are those of a part's weight.

    A shape that two parts share counts for both.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.work: dict[str, int] = defaultdict(int)
        self._shapes = {part: [Counter(shape) for shape in own] for part, own in shapes.items()}

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
            batch = first.shape[0] if first.dim() == second.dim() == 3 else 1
            sizes = Counter((rows, inner, columns))
            for part, shapes in self._shapes.items():
                if any(shape <= sizes for shape in shapes):
                    self.work[part] += batch * rows * inner * columns
        elif func.overloadpacket in _KERNELS:
            # All calls of a step are about the same tokens; those for groups of heads have smaller queries.
            self.work["attention"] += _KERNELS[func.overloadpacket] * args[0].numel()
        return func(*args, **(kwargs or {}))


def _shapes_in_layers(model: nn.Module) -> Shapes:
    """Sizes of the layers' matrices: an MLP's are those that another one leads back from, and experts'."""
    mlp: set[tuple[int, int]] = set()
    projection: set[tuple[int, int]] = set()
    for _, layer in find_layers(model):
        names = {part: name for name, part in layer.named_modules()}
        around: set[tuple[int, int]] = set()
        own: set[tuple[int, int]] = set()
        for linear in linear_layers(layer):
            shape = linear_shape(linear)
            if shape is not None:
                (around if ATTENTION.search(names[linear]) else own).add(shape)
        inside: set[tuple[int, int]] = {true_shape(p)[1:] for p in layer.parameters() if p.dim() == 3}
        for wide, narrow in own:  # down: I -> D
            if {(narrow, wide), (narrow, 2 * wide)} & own:
                inside |= {(wide, narrow), *({(narrow, wide), (narrow, 2 * wide)} & own)}
        mlp |= inside
        projection |= around | (own - inside)
    return {"mlp": mlp, "projection": projection}


def _shapes_of_heads(model: nn.Module) -> set[tuple[int, int]]:
    """Sizes of the output embeddings that modules name, and of the slices in which their gradients are added up."""
    shapes: set[tuple[int, int]] = set()
    for module in model.modules():
        head = getattr(module, "get_output_embeddings", lambda: None)()
        shape = linear_shape(head) if isinstance(head, nn.Module) else None
        if shape is not None:
            width, vocabulary = shape
            slices = chunk_bounds(vocabulary, min(WEIGHT_SLICES, vocabulary))
            shapes |= {shape, *((width, stop - start) for start, stop in slices)}
    return shapes
