"""An MLP in mini-sequence form."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_mst.rewrite.call import Call
from lightning_mst.rewrite.routers import has_listeners, rewrite_router
from lightning_mst.rewrite.shadow import form_of, original_forward, original_method, shadow_method


@dataclass
class _MLPForm:
    chunks: int | str
    # What the block uses, as far as it isn't the module itself.
    parts: list[nn.Module] = field(default_factory=list)
    follower: nn.Module | None = None
    routers: list[nn.Module] = field(default_factory=list)
    # The output that has been through the follower already, until the follower is called with it.
    finished: weakref.ref[Tensor] | None = None


@dataclass
class _FollowerForm:
    mlp: nn.Module


def rewrite_mlp(
    mlp: nn.Module, chunks: int | str, *, follower: nn.Module | None = None, routers: list[nn.Module] | None = None
) -> None:
    """Lets an MLP or a mixture of experts run over mini-sequences.

    Args:
        mlp: a module of one or more tensors (..., D) that treats every token alike.
        chunks: M, ``"auto"`` or ``"paper"``.
        follower: the norm or dropout that the decoder layer applies to the MLP's output, if it does. It joins the
            mini-sequences: outside them it would need the MLP's output again, which checkpointing would then have to
            compute once more.
        routers: the submodules that score experts, whose outputs others may record.
    """
    routers = routers or []
    shadow_method(mlp, _mlp_forward, _MLPForm(chunks, [mlp], follower, routers))
    for router in routers:
        rewrite_router(router)
    if follower is not None:
        shadow_method(follower, _follower_forward, _FollowerForm(mlp))


def rewrite_method(layer: nn.Module, name: str, chunks: int | str, parts: list[nn.Module]) -> None:
    """Lets a layer's feed-forward method run over mini-sequences.

    Args:
        layer: the layer.
        name: the method, a function of one tensor (..., D).
        chunks: M, ``"auto"`` or ``"paper"``.
        parts: the children that the method uses.
    """
    shadow_method(layer, partial(_run_method, name), _MLPForm(chunks, parts), name)


def _mlp_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    form: _MLPForm = form_of(self)
    forward = original_forward(self)
    call = Call(type(self).__name__, args, kwargs)
    num_chunks = call.num_chunks(form.chunks)
    if num_chunks == 1:
        return forward(*args, **kwargs)
    routers = [router for router in form.routers if has_listeners(router)]
    follower = form.follower
    if follower is None:
        return call.run(forward, num_chunks, parts=form.parts, routers=routers)
    finish = original_forward(follower)
    result = call.run(forward, num_chunks, parts=[*form.parts, follower], routers=routers, finish=finish)
    form.finished = weakref.ref(result[0] if isinstance(result, tuple) else result)
    return result


def _run_method(name: str, self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    form: _MLPForm = form_of(self, name)
    method = original_method(self, name)
    call = Call(f"{type(self).__name__}.{name}", args, kwargs)
    num_chunks = call.num_chunks(form.chunks)
    return method(*args, **kwargs) if num_chunks == 1 else call.run(method, num_chunks, parts=form.parts)


def _follower_forward(self: nn.Module, x: Tensor) -> Tensor:
    mlp_form: _MLPForm = form_of(form_of(self).mlp)
    finished, mlp_form.finished = mlp_form.finished, None
    if finished is None:
        return original_forward(self)(x)
    if finished() is not x:
        raise RuntimeError(
            f"{type(self).__name__} joined the mini-sequences of the MLP before it, but was called with something "
            "other than that MLP's output. Name the MLPs yourself (mlp_modules=...), which joins nothing."
        )
    return x


FEED_FORWARD_METHODS = ("feed_forward_chunk", "ff_chunk", "_ff_block")
"""Methods by which transformers' encoders and PyTorch's own layers run their feed-forward part."""
