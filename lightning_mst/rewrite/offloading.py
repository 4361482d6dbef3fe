"""What checkpointed layers keep for the backward pass, on the host in place of the device."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lightning_mst.ops.free_host_memory import free_host_memory, processes_here
from lightning_mst.ops.host_memory import HostMemory, NotEnoughHostMemory
from lightning_mst.ops.kept_attention import keeping_attention
from lightning_mst.ops.moved import dense
from lightning_mst.ops.region import Region
from lightning_mst.ops.rehearsal import is_rehearsing
from lightning_mst.rewrite.auto_fraction import AutoFraction
from lightning_mst.units import in_words

_log = logging.getLogger(__name__)


class Offload:
    """Checkpoints the layers of one model, and moves to the host what they keep between forward and backward pass.

    A layer's input leaves the device while the layer runs, and returns while the layer after it is differentiated: the
    copies hide behind the computation. Other tensors that a layer is given stay where they are, as all layers share
    them: masks, rotary embeddings, an encoder's output.

    Args:
        what: ``"inputs"`` or ``"inputs+attention"``, as ``MSTConfig.checkpoint_offload``.
        num_layers: how many layers it checkpoints.
        fraction: as ``MSTConfig.offload_fraction``.

    Attributes:
        memory: the pool of host memory.
    """

    def __init__(
        self,
        what: Literal["inputs", "inputs+attention"],
        num_layers: int,
        fraction: float | Literal["auto"] = 0.0,
    ) -> None:
        self._what = what
        self._fraction = fraction
        self._num_layers = num_layers
        self.memory = HostMemory()
        self._last: Callable[[], Region | None] = _none
        self._checked_bytes = 0
        self._seeks_attention = what == "inputs+attention"
        self._calls_without_attention = 0
        self._auto = AutoFraction(num_layers) if fraction == "auto" else None

    def __reduce__(self) -> Any:
        """As a new one: a copy of a model has its own pool, and nothing in it."""
        return Offload, (self._what, self._num_layers, self._fraction)

    @torch.compiler.disable
    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs a layer; in place of ``partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)``.

        Args:
            function: the layer's forward; a ``functools.partial`` of it may hold keyword arguments.
            *args: its positional arguments.

        Returns:
            What it returns.

        Raises:
            NotEnoughHostMemory: what all layers keep does not fit into the host's memory.
            RuntimeError: attention is to be kept, but the layers' attention is not one fused operator.
        """
        if not torch.is_grad_enabled():
            return function(*args)
        before = self._last()
        if before is not None:
            before.leave()
        run, hidden = _apart(function, args)
        region = Region(self.memory, before, self._fraction_of(hidden, is_first=before is None))
        self._last = weakref.ref(region)
        options: dict[str, Any] = {"use_reentrant": False}
        if self._what == "inputs+attention":
            options["context_fn"] = partial(keeping_attention, region)
        if hidden is None:
            # Without a graph before it: one layer's input at most, such as the first one's in a frozen model.
            result = checkpoint(run, *args, **options)
        else:
            with saved_tensors_hooks(partial(_pack, region), _unpack):
                # A view with gaps would come back without them, for which an operator may go another way.
                result = checkpoint(run, dense(hidden), **options)
        if self._auto is not None:
            self._auto.end(region)
        self._check_attention(region, function)
        self._check_memory(region)
        return result

    def release(self) -> None:
        """Gives the host's memory back to the system, but for what a backward pass may still ask for."""
        self.memory.release()

    def _fraction_of(self, hidden: Tensor | None, *, is_first: bool) -> float:
        if not isinstance(self._fraction, str):
            return float(self._fraction)
        if hidden is None or self._auto is None or isinstance(hidden, FakeTensor):
            return 0.0  # fake ones take no time
        return self._auto.begin(hidden.shape[:-1].numel(), hidden.device, self.memory, is_first=is_first)

    def _check_attention(self, region: Region, function: Callable[..., Any]) -> None:
        """Notices after as many calls as there are layers that none has fused attention; some layers need not."""
        if not self._seeks_attention:
            return
        self._seeks_attention = not region.has_attention
        self._calls_without_attention += not region.has_attention
        if self._calls_without_attention >= self._num_layers:
            raise RuntimeError(
                "checkpoint_offload='inputs+attention' keeps the results of fused attention, but no checkpointed layer "
                f"ran any: {_attention_of(function)}. Choose attn_implementation='flash_attention_2' or 'sdpa' (with "
                "inputs that torch's fused kernels take), or checkpoint_offload='inputs'."
            )

    def _check_memory(self, region: Region) -> None:
        """Says how much memory all layers need when the first one has run, and again when one needs more."""
        size = region.host_bytes
        if is_rehearsing() or size <= self._checked_bytes:
            return
        processes = processes_here()
        needed = size * self._num_layers * processes
        available = free_host_memory() + self.memory.allocated * processes
        what = (
            f"checkpoint_offload={self._what!r} needs {in_words(needed)} of host memory: {in_words(size)} for each of "
            f"{self._num_layers} layers"
            + (f" in each of {processes} processes on this machine" if processes > 1 else "")
        )
        if needed > available:
            raise NotEnoughHostMemory(
                f"{what}; {in_words(available)} are available. Take shorter sequences, a smaller batch or fewer "
                "processes on this machine, or checkpoint_offload='inputs' or None."
            )
        self._checked_bytes = size
        _log.info("%s; %s are available.", what, in_words(available))


def _none() -> None:
    return None


def _attention_of(function: Callable[..., Any]) -> str:
    """Which attention a layer of transformers has, in words."""
    arguments = (*function.args, getattr(function.func, "__self__", None)) if isinstance(function, partial) else ()
    for layer in (argument for argument in arguments if isinstance(argument, nn.Module)):
        for module in layer.modules():
            name = getattr(getattr(module, "config", None), "_attn_implementation", None)
            if name is not None:
                return f"its attn_implementation is {name!r}"
    return "its attention consists of several operators, or runs inside of a compiled one"


def _apart(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Callable[..., Any], Tensor | None]:
    """A function of the hidden states alone, and those: the first tensor with a graph, by position or by keyword."""
    for index, value in enumerate(args):
        if isinstance(value, Tensor) and value.requires_grad:
            return partial(_by_position, function, args[:index], args[index + 1 :]), value
    if isinstance(function, partial):
        for name, value in function.keywords.items():
            if isinstance(value, Tensor) and value.requires_grad:
                others = {key: other for key, other in function.keywords.items() if key != name}
                rest = partial(function.func, *function.args, *args, **others)
                return partial(_by_keyword, rest, name), value
    return function, None


def _by_position(function: Callable[..., Any], before: tuple[Any, ...], after: tuple[Any, ...], hidden: Tensor) -> Any:
    return function(*before, hidden, *after)


def _by_keyword(function: Callable[..., Any], name: str, hidden: Tensor) -> Any:
    return function(**{name: hidden})


# Non-reentrant checkpointing saves its positional tensors as autograd saves any other, so that hooks see them; what it
# is given by keyword, or in a closure, they don't see.
def _pack(region: Region, tensor: Tensor) -> Region | Tensor:
    if not tensor.numel():
        return tensor  # older releases save an empty one with it
    region.keep_input(tensor)
    return region


def _unpack(packed: Region | Tensor) -> Tensor:
    return packed.fetch_input() if isinstance(packed, Region) else packed
