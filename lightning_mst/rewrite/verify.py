"""Checking a rewritten model against itself without the rewrite, on the user's own data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mst.ops.context import RNGState
from lightning_mst.rewrite.handle import MSTHandle
from lightning_mst.rewrite.modes import eval_mode

# How far apart two correct runs may be: sums in another order, and in half precision other roundings all the way down.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 1e-1}


class VerificationError(RuntimeError):
    """The rewritten model's loss or gradients are not the unmodified model's."""


@dataclass(frozen=True)
class Verification:
    """The result of a comparison that held.

    Attributes:
        loss_difference: absolute difference of the two losses.
        worst_parameter: the name of the parameter whose gradients are furthest apart.
        gradient_difference: norm of the difference of its gradients over the norm of its unmodified gradient.
        in_eval_mode: whether dropout was switched off for the comparison, because two runs draw different masks.
    """

    loss_difference: float
    worst_parameter: str
    gradient_difference: float
    in_eval_mode: bool


def verify(handle: MSTHandle, compute_loss: Callable[[], Tensor], *, dtype: torch.dtype | None = None) -> Verification:
    """Computes a loss and its gradients with and without the rewrite and compares them.

    The model keeps its form, its modes and its ``.grad``; one extra copy of the gradients and one step of the
    unmodified model must fit in memory.

    Args:
        handle: the rewritten model.
        compute_loss: runs the model on a batch and returns the loss, a scalar in nats with a graph.
        dtype: the precision of the arithmetic, for the tolerance. Default: the parameters' lowest.

    Returns:
        What was compared, if it agrees.

    Raises:
        VerificationError: if it does not.
    """
    model, config = handle.model, handle.config
    if config is None:
        raise ValueError("The handle's rewrite was removed; there is nothing to verify.")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if dtype is None:
        dtype = min((p.dtype for p in trained.values()), key=lambda d: torch.finfo(d).bits, default=torch.float32)
    device = next(iter(model.parameters())).device
    rng = RNGState(device)
    handle.remove()
    try:
        with rng.replayed():
            expected = _loss_and_gradients(compute_loss, trained)
            drew_random_numbers = not rng.is_current()
        if drew_random_numbers:
            # Chunks draw dropout masks in another order, so only without dropout do both compute the same thing.
            with rng.replayed(), eval_mode(model):
                expected = _loss_and_gradients(compute_loss, trained)
    finally:
        handle.update(config)
    with rng.replayed():
        if drew_random_numbers:
            with eval_mode(model):
                got = _loss_and_gradients(compute_loss, trained)
        else:
            got = _loss_and_gradients(compute_loss, trained)
    return _compare(expected, got, list(trained), _TOLERANCE.get(dtype, 1e-1), drew_random_numbers)


_Result = tuple[Tensor, tuple[Tensor | None, ...]]


def _loss_and_gradients(compute_loss: Callable[[], Tensor], trained: dict[str, Tensor]) -> _Result:
    with torch.enable_grad():
        loss = compute_loss()
        # Not backward(): that would fill .grad, and set off the hooks of DDP and of optimizers in backward.
        grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return loss.detach(), grads


def _compare(expected: _Result, got: _Result, names: list[str], tolerance: float, eval_mode: bool) -> Verification:
    (loss, grads), (new_loss, new_grads) = expected, got
    if not torch.isclose(new_loss.double(), loss.double(), rtol=tolerance, atol=tolerance, equal_nan=True):
        raise VerificationError(
            f"With mini-sequences the first batch's loss is {new_loss.item():.8g}, without it is {loss.item():.8g}. "
            + _ADVICE
        )
    total = max((g.double().norm().item() for g in grads if g is not None), default=0.0)
    worst, worst_name = 0.0, ""
    for name, old, new in zip(names, grads, new_grads, strict=True):
        if (old is None) != (new is None):
            state = ("has none", "has one") if old is None else ("has one", "has none")
            raise VerificationError(
                f"The gradient of {name}: the unmodified model {state[0]}, with mini-sequences it {state[1]}. {_ADVICE}"
            )
        if old is None or new is None:
            continue
        # A gradient that is next to nothing beside the others is all rounding; it is held to the others' size.
        size = max(old.double().norm().item(), 1e-3 * total)
        difference = (new.double() - old.double()).norm().item() / size if size else new.double().norm().item()
        if not difference <= tolerance and torch.isfinite(old).all():
            raise VerificationError(
                f"The gradient of {name} differs from the unmodified model's by {difference:.3g} of its norm "
                f"(allowed: {tolerance:g}). {_ADVICE}"
            )
        if difference >= worst:
            worst, worst_name = difference, name
    return Verification((new_loss - loss).abs().item(), worst_name, worst, eval_mode)


_ADVICE = (
    "The rewrite would train another function, so training stops here. Find the block with "
    "mlp_chunks=None, lm_head_chunks=None or layer_chunks=None, leave it off, and please report the model's name."
)
