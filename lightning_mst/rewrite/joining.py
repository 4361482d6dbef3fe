"""Modules that join the block before them: the second of two projections, the norm or dropout after an MLP."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_mst.ops.context import AutocastState
from lightning_mst.ops.deferred_output import DeferredOutput, defer_output
from lightning_mst.rewrite.call import Call
from lightning_mst.rewrite.fsdp1 import weights_of
from lightning_mst.rewrite.handed_on import real
from lightning_mst.rewrite.pace import Pace
from lightning_mst.rewrite.shadow import form_of, original_forward, shadow_method
from lightning_mst.rewrite.shapes import linear_shape


@dataclass
class FirstForm:
    """The settings of the first of two projections."""

    chunks: int | str
    # As in MLPForm.
    in_checkpoint: bool = True
    pace: Pace = field(default_factory=Pace)


@dataclass
class JoiningForm:
    """What a module that joins others remembers, if it does."""

    joined: DeferredOutput | None = None
    notes: bool = False


def rewrite_pair(first: nn.Module, second: nn.Module, chunks: int | str) -> None:
    """Lets ``second(pointwise(first(x)))`` run over mini-sequences, wherever it is called.

    Args:
        first: the up projection, a linear layer of (..., D).
        second: the down projection, a linear layer of (..., I).
        chunks: M, ``"auto"`` or ``"paper"``.
    """
    shadow_method(first, _first_forward, FirstForm(chunks))
    rewrite_joining(second)


def rewrite_joining(module: nn.Module, *, notes: bool = False) -> None:
    """Lets a token-wise module run with the block whose deferred output it is given.

    Args:
        module: a function of one tensor (..., D).
        notes: whether to remember what it joined, for ``has_joined``.
    """
    shadow_method(module, _joining_forward, JoiningForm(notes=notes))


def has_joined(module: nn.Module) -> bool:
    """Whether a module that takes notes joined a block, and nobody else wanted the block's output."""
    form: JoiningForm = form_of(module)
    return form.joined is not None and not form.joined.was_computed


def defer(call: Call, width: int, **how: Any) -> DeferredOutput:
    """What a block answers whose output something may join.

    Args:
        call: the block's arguments.
        width: of its output.
        **how: as for ``Call.run``, but for what joins.
    """
    x = call.x
    dtype = AutocastState.now(x.device).cast(x.new_empty(0)).dtype
    return defer_output(partial(call.run, **how), (*x.shape[:-1], width), dtype, x.device)


def _first_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    form: FirstForm = form_of(self)
    forward = original_forward(self)
    call = Call(type(self).__name__, args, kwargs)
    num_chunks = call.num_chunks(form.chunks, form.pace)
    whole = num_chunks == 1 and not call.is_worth_recomputing(form.chunks, in_checkpoint=form.in_checkpoint)
    # A hook before it may gather weights that are gone again when the second projection is called.
    if whole or self._forward_pre_hooks:
        args, kwargs = real((args, kwargs))
        return forward(*args, **kwargs)
    shape = linear_shape(self)
    assert shape is not None
    return defer(call, shape[1], forward=forward, num_chunks=num_chunks, parts=[self])


def _joining_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = original_forward(self)
    if len(args) != 1 or kwargs or not isinstance(args[0], DeferredOutput):
        return forward(*args, **kwargs)
    form: JoiningForm = form_of(self)
    if form.notes:
        form.joined = args[0]
    return args[0].finish(forward, weights_of(self))
