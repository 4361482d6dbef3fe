"""Trying a module instead of guessing: does it treat every token alike?"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_mst.ops.context import AutocastState, RNGState
from lightning_mst.rewrite.modes import eval_mode
from lightning_mst.rewrite.shadow import original_forward

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def why_not_token_wise(module: nn.Module, hidden_size: int) -> str | None:
    """Runs a few random tokens through a module, as a whole and in two pieces.

    Args:
        module: the candidate, a function of one tensor (1, tokens, hidden_size). Its mode, its buffers and the random
            number generators are left as they were.
        hidden_size: D; 0 if it isn't known.

    Returns:
        ``None`` if both runs agree, or if the module can't be tried (meta device, sharded
        parameters, unknown D); else what went wrong.
    """
    weights = [p for p in module.parameters() if p.is_floating_point()]
    if (
        hidden_size == 0
        or not weights
        or any(p.is_meta or is_traceable_wrapper_subclass(p) for p in module.parameters())
    ):
        return None
    dtype, device = weights[0].dtype, weights[0].device
    tokens = torch.randn(1, 5, hidden_size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.no_grad(), AutocastState.now(device).disabled(), RNGState(device).replayed():
        answer = _compare(module, tokens)
        if answer is None:
            # Zeros say nothing: weights start as zeros in some models. Random ones in a copy do.
            clone = copy.deepcopy(module)
            for parameter in clone.parameters():
                if parameter.is_floating_point():
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
            answer = _compare(clone, tokens)
    return answer or None


def _compare(module: nn.Module, tokens: Tensor) -> str | None:
    """``""`` for equal, ``None`` for undecided, else the difference in words."""
    forward = original_forward(module)
    with eval_mode(module):
        try:
            whole = forward(tokens)
            pieces = [forward(tokens[:, :2]), forward(tokens[:, 2:])]
        except Exception as error:  # whatever a stranger's forward raises is the answer, and is shown
            return f"does not run on (1, tokens, D) alone ({type(error).__name__}: {error})"
    if not isinstance(whole, Tensor) or whole.shape != tokens.shape:
        got = tuple(whole.shape) if isinstance(whole, Tensor) else type(whole).__name__
        return f"does not map D to D (a probe of shape {tuple(tokens.shape)} gave {got})"
    if not torch.isfinite(whole).all():
        return ""
    if not whole.any():
        return None
    difference = (whole - torch.cat(pieces, dim=1)).abs().max() / whole.abs().max()
    if difference > _TOLERANCE.get(whole.dtype, 5e-2):
        return f"mixes tokens (a probe in two pieces differs by {difference.item():.2g} of the largest output)"
    return ""
