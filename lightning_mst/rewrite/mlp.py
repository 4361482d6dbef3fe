"""An MLP in mini-sequence form."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from lightning_mst.ops.chunking import BlockCost
from lightning_mst.rewrite.call import Call
from lightning_mst.rewrite.handed_on import real
from lightning_mst.rewrite.hooks import is_hooked
from lightning_mst.rewrite.joining import defer, rewrite_joining
from lightning_mst.rewrite.pace import Pace
from lightning_mst.rewrite.routers import has_listeners, rewrite_router
from lightning_mst.rewrite.shadow import form_of, original_forward, original_method, shadow_method
from lightning_mst.rewrite.structure import expert_sparsity


@dataclass
class MLPForm:
    """The settings of an MLP, or of a method, in mini-sequence form."""

    chunks: int | str
    # What the block uses, as far as it isn't the module itself.
    parts: list[nn.Module] = field(default_factory=list)
    is_followed: bool = False
    routers: list[nn.Module] = field(default_factory=list)
    sparsity: int = 1
    # Of a block that is a module of its own.
    cost: BlockCost | None = None
    # Whether its layer is recomputed, so that it keeps nothing for backward as it is.
    in_checkpoint: bool = True
    pace: Pace = field(default_factory=Pace)


def rewrite_mlp(
    mlp: nn.Module,
    chunks: int | str,
    *,
    follower: nn.Module | None = None,
    routers: list[nn.Module] | None = None,
    cost: BlockCost | None = None,
) -> None:
    """Lets an MLP or a mixture of experts run over mini-sequences.

    Args:
        mlp: a module of one or more tensors (..., D) that treats every token alike.
        chunks: M, ``"auto"`` or ``"paper"``.
        follower: the norm or dropout that the decoder layer applies to the MLP's output, if it does. It joins the
            mini-sequences: outside them it would need the MLP's output again, which checkpointing would then have to
            compute once more.
        routers: the submodules that score experts, whose outputs others may record.
        cost: what a split saves and costs, where it is known.
    """
    routers = routers or []
    form = MLPForm(chunks, [mlp], follower is not None, routers, expert_sparsity(mlp), cost)
    shadow_method(mlp, _mlp_forward, form)
    for router in routers:
        rewrite_router(router)
    if follower is not None:
        rewrite_joining(follower)


def rewrite_method(layer: nn.Module, name: str, chunks: int | str, parts: list[nn.Module]) -> None:
    """Lets a layer's feed-forward method run over mini-sequences.

    Args:
        layer: the layer.
        name: the method, a function of one tensor (..., D).
        chunks: M, ``"auto"`` or ``"paper"``.
        parts: the children that the method uses.
    """
    shadow_method(layer, partial(_run_method, name), MLPForm(chunks, parts), name)


def _mlp_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    form: MLPForm = form_of(self)
    forward = original_forward(self)
    call = Call(type(self).__name__, args, kwargs)
    num_chunks = call.num_chunks(form.chunks, form.pace, form.sparsity, form.cost)
    if num_chunks == 1 and not call.is_worth_recomputing(form.chunks, in_checkpoint=form.in_checkpoint):
        args, kwargs = real((args, kwargs))
        return forward(*args, **kwargs)
    routers = [router for router in form.routers if has_listeners(router)]
    how: dict[str, Any] = {"forward": forward, "num_chunks": num_chunks, "parts": form.parts, "routers": routers}
    # Whoever hooks the MLP, to gather its weights or to see its output, expects its work to be done inside.
    return defer(call, call.x.shape[-1], **how) if form.is_followed and not is_hooked(self) else call.run(**how)


def _run_method(name: str, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    form: MLPForm = form_of(self, name)
    method = original_method(self, name)
    call = Call(f"{type(self).__name__}.{name}", args, kwargs)
    num_chunks = call.num_chunks(form.chunks, form.pace)
    if num_chunks == 1 and not call.is_worth_recomputing(form.chunks, in_checkpoint=form.in_checkpoint):
        args, kwargs = real((args, kwargs))
        return method(*args, **kwargs)
    return call.run(forward=method, num_chunks=num_chunks, parts=form.parts)


FEED_FORWARD_METHODS = ("feed_forward_chunk", "ff_chunk", "_ff_block")
"""Methods by which transformers' encoders and PyTorch's own layers run their feed-forward part."""
