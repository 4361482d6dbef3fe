"""What a forward pass ran under and a later recomputation must run under again: autocast and random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import get_device_states, set_device_states


@dataclass(frozen=True)
class AutocastState:
    """Whether autocast was on for a device type, and to which dtype."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: torch.device) -> AutocastState:
        """The state in force for ``device`` at the moment of the call."""
        kind = device.type
        if not torch.amp.is_autocast_available(kind):
            return cls(kind, False, torch.float32)
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def restored(self) -> AbstractContextManager[object]:
        """Runs the body under this state, whatever is in force outside."""
        if not self.enabled and not _is_on(self.device_type):
            return nullcontext()
        return _autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)

    def disabled(self) -> AbstractContextManager[object]:
        """Runs the body without autocast, for code that casts by itself."""
        return _autocast(self.device_type, enabled=False)

    def cast(self, tensor: Tensor) -> Tensor:
        """``tensor`` as autocast hands it to a matmul: in ``dtype``, but float64 as it is."""
        return tensor.to(self.dtype) if self.enabled and tensor.dtype != torch.float64 else tensor


def _is_on(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _autocast(device_type: str, **options: Any) -> AbstractContextManager[object]:
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, **options)


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Lets an autograd node's backward refuse a graph of the gradient, which it could only build wrongly.

    ``once_differentiable`` does not do: it notices only an incoming gradient that has a graph itself.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Gradients of a block in mini-sequence form can't be differentiated again (create_graph=True). Switch "
                "the block off for such a step: mlp_chunks=None, lm_head_chunks=None, layer_chunks=None."
            )
        return backward(ctx, *grads)

    return checked


def drop_autocast_copies() -> None:
    """Forgets the half-precision weight copies that autocast made.

    Autocast keeps one copy per weight until its outermost block ends. A copy made under ``no_grad`` has no graph, so
    whoever used the same weight later in the same block would silently lose its gradient.
    """
    if torch.is_autocast_cache_enabled():
        torch.clear_autocast_cache()


class RNGState:
    """The state of the CPU's random number generator and of one device's (5 KB and, on a GPU, 16 bytes)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._ids, self._states = get_device_states(torch.empty(0, device=device))

    def restore(self) -> None:
        """Puts the generators into this state."""
        torch.set_rng_state(self._cpu)
        if self._ids:
            set_device_states(self._ids, self._states, device_type=self._device.type)

    def is_current(self) -> bool:
        """Whether no random number has been drawn since this state. Fake tensors draw none."""
        now = RNGState(self._device)
        if isinstance(now._cpu, FakeTensor):
            return True
        return torch.equal(self._cpu, now._cpu) and all(map(torch.equal, self._states, now._states))

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Runs the body with the random numbers that followed this state, then puts the generators back."""
        current = RNGState(self._device)
        self.restore()
        try:
            yield
        finally:
            current.restore()
