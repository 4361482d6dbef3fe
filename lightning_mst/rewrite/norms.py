"""Norms in mini-sequence form, each together with what comes before or after it where that is possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mst.ops.context import AutocastState
from lightning_mst.ops.deferred_output import DeferredOutput
from lightning_mst.rewrite.call import Call
from lightning_mst.rewrite.fsdp1 import weights_of
from lightning_mst.rewrite.handed_on import HandedOn
from lightning_mst.rewrite.hooks import has_pre_hooks, is_hooked
from lightning_mst.rewrite.pace import Pace
from lightning_mst.rewrite.shadow import form_of, is_shadowed, original_forward, shadow_method


@dataclass
class NormForm:
    """The settings of a norm in mini-sequence form."""

    chunks: int | str
    # The blocks that get its output, and nothing else does; empty where they can't apply it.
    receivers: list[nn.Module]
    # By the dtypes of input and autocast: that of the output.
    dtypes: dict[object, torch.dtype] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)


def rewrite_norm(norm: nn.Module, chunks: int | str, *, receivers: Sequence[nn.Module] = ()) -> None:
    """Lets a norm run over mini-sequences.

    A norm that follows a block, whose output it is given before that is computed, joins it. Another one leaves its work
    to the blocks that come next, where these run over mini-sequences.

    Args:
        norm: a function of one tensor (..., D), for each token by itself.
        chunks: M, ``"auto"`` or ``"paper"``.
        receivers: the blocks that get its output, if nothing else does.
    """
    shadow_method(norm, _norm_forward, NormForm(chunks, list(receivers)))


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
    if not _can_hand_on(self, form.receivers):
        return call.run(forward=forward, num_chunks=num_chunks, parts=[self])
    return HandedOn(self, forward, call.x, num_chunks=num_chunks, dtype=_dtype_after(form, forward, call.x))


def _can_hand_on(norm: nn.Module, receivers: list[nn.Module]) -> bool:
    # Whoever hooks the norm, to gather its weights or to see its output, expects its work to be done inside; and who
    # hooks a block before it runs may hand the norm's output to autograd, for which it has no graph.
    return bool(receivers) and not is_hooked(norm) and all(is_shadowed(m) and not has_pre_hooks(m) for m in receivers)


def _dtype_after(form: NormForm, forward: Any, x: Tensor) -> torch.dtype:
    """The dtype of the norm's output: tried, on one token."""
    autocast = AutocastState.now(x.device)
    key = (x.dtype, autocast)
    if key not in form.dtypes:
        with torch.no_grad():
            form.dtypes[key] = forward(x[..., :1, :]).dtype
    return form.dtypes[key]
