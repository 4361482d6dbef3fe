"""An MLP in mini-sequence form."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_mst.ops.chunking import mlp_num_chunks
from lightning_mst.ops.token_wise import token_wise
from lightning_mst.rewrite.shadow import form_of, original_forward, shadow_forward


@dataclass
class _MLPForm:
    chunks: int | str
    post_norm: nn.Module | None
    # The output that has been through the post-norm already, until the post-norm is called with it.
    normed: weakref.ref[Tensor] | None = None


@dataclass
class _PostNormForm:
    mlp: nn.Module


def rewrite_mlp(mlp: nn.Module, chunks: int | str, post_norm: nn.Module | None = None) -> None:
    """Lets an MLP run over mini-sequences.

    Args:
        mlp: a module of one tensor (..., D) that treats every token alike.
        chunks: M, ``"auto"`` or ``"paper"``.
        post_norm: the norm that the decoder layer applies to the MLP's output, if it does. It joins the mini-sequences:
            outside them it would save the MLP's output, which checkpointing would then have to compute again.
    """
    shadow_forward(mlp, _mlp_forward, _MLPForm(chunks, post_norm))
    if post_norm is not None:
        shadow_forward(post_norm, _post_norm_forward, _PostNormForm(mlp))


def _mlp_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    form: _MLPForm = form_of(self)
    values = (*args, *kwargs.values())
    if len(values) != 1 or not isinstance(values[0], Tensor):
        raise TypeError(
            f"{type(self).__name__} runs in mini-sequences as a function of one tensor, but was called with "
            f"{len(values)} arguments. Name the MLPs yourself (mlp_modules=...) or set mlp_chunks=None."
        )
    x = values[0]
    hidden_size = x.shape[-1]
    num_chunks = mlp_num_chunks(form.chunks, num_tokens=x.numel() // max(1, hidden_size), hidden_size=hidden_size)
    forward = original_forward(self)
    if num_chunks == 1:
        return forward(x)
    norm = form.post_norm
    if norm is None:
        return token_wise(forward, x, num_chunks=num_chunks, parameters=self.parameters())
    norm_forward = original_forward(norm)
    result = token_wise(
        lambda part: norm_forward(forward(part)),
        x,
        num_chunks=num_chunks,
        parameters=[*self.parameters(), *norm.parameters()],
    )
    form.normed = weakref.ref(result)
    return result


def _post_norm_forward(self: nn.Module, x: Tensor) -> Tensor:
    mlp_form: _MLPForm = form_of(form_of(self).mlp)
    normed, mlp_form.normed = mlp_form.normed, None
    if normed is None:
        return original_forward(self)(x)
    if normed() is not x:
        raise RuntimeError(
            f"{type(self).__name__} joined the mini-sequences of the MLP before it, but was called with something "
            "other than that MLP's output. Name the MLPs yourself (mlp_modules=...), which joins no norm."
        )
    return x
