"""Norms in mini-sequence form, each together with what comes before or after it where that is possible."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mst.ops.context import AutocastState
from lightning_mst.ops.deferred_output import DeferredOutput
from lightning_mst.rewrite.call import Call
from lightning_mst.rewrite.fsdp1 import weights_of
from lightning_mst.rewrite.handed_on import HandedOn
from lightning_mst.rewrite.pace import Pace
from lightning_mst.rewrite.shadow import form_of, original_forward, shadow_method


@dataclass
class NormForm:
    """The settings of a norm in mini-sequence form."""

    chunks: int | str
    # Whether what comes next may apply it. Outside of the layers nothing does.
    hands_on: bool
    # By the dtypes of input and autocast: that of the output.
    dtypes: dict[object, torch.dtype] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)


def rewrite_norm(norm: nn.Module, chunks: int | str, *, hands_on: bool) -> None:
    """Lets a norm run over mini-sequences.

    A norm that follows a block, whose output it is given before that is computed, joins it. Another one leaves its work
    to the block that comes next.

    Args:
        norm: a function of one tensor (..., D), for each token by itself.
        chunks: M, ``"auto"`` or ``"paper"``.
        hands_on: whether it is part of a layer.
    """
    shadow_method(norm, _norm_forward, NormForm(chunks, hands_on))


def _norm_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    form: NormForm = form_of(self)
    forward = original_forward(self)
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        return forward(*args, **kwargs)
    if isinstance(args[0], DeferredOutput):
        return args[0].finish(forward, weights_of(self))
    call = Call(type(self).__name__, args, kwargs)
    num_chunks = call.num_chunks(form.chunks, form.pace)
    if num_chunks == 1:
        return forward(*args)
    # Whoever hooks the norm, to gather its weights or to see its output, expects its work to be done inside.
    if not form.hands_on or self._forward_pre_hooks or self._forward_hooks:
        return call.run(forward=forward, num_chunks=num_chunks, parts=[self])
    return HandedOn(self, forward, call.x, num_chunks=num_chunks, dtype=_dtype_after(form, forward, call.x))


def _dtype_after(form: NormForm, forward: Any, x: Tensor) -> torch.dtype:
    """The dtype of the norm's output: tried, on one token."""
    autocast = AutocastState.now(x.device)
    key = (x.dtype, autocast)
    if key not in form.dtypes:
        with torch.no_grad():
            form.dtypes[key] = forward(x[..., :1, :]).dtype
    return form.dtypes[key]
