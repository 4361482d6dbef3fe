"""A tensor that waits on the host until it is needed again."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_mst.ops.host_memory import HostMemory, slabs_bytes


class Moved:
    """A copy of a tensor on the host.

    The copies run on a stream of their own beside the computation. Nothing ever waits for them on the CPU, and no
    memory is marked for several streams (``record_stream``), which would be free again only at some later time: the
    computing stream itself waits, before the tensor's memory on the device is given up.

    1. At once: the tensor begins to leave. It is still on the device.
    2. ``leave``: it is gone from the device, so far as this handle holds it.
    3. ``return_early``: begins to bring it back, while something else is computed.
    4. ``fetch``: it is on the device again. Can be repeated.

    What dies without being fetched gives its memory back on both sides.

    Args:
        tensor: any shape, plain and dense; others are copied to be so.
        memory: where to.

    Attributes:
        host_bytes: what it takes on the host.

    Raises:
        NotEnoughHostMemory: the host has no room.
        TypeError: for a tensor that is made of others.
    """

    def __init__(self, tensor: Tensor, memory: HostMemory) -> None:
        self._slabs: list[Tensor] = []
        self._here: Tensor | None = None
        self._memory = memory
        tensor = dense(tensor.detach())
        self._shape, self._stride, self._dtype = tensor.shape, tensor.stride(), tensor.dtype
        self._lane = lane_of(tensor.device)
        self._version = tensor._version
        self.host_bytes = slabs_bytes(tensor.nbytes)
        self._slabs = memory.take(tensor.nbytes, tensor.device)
        self._here = tensor
        self._is_original = True
        self._copied = self._lane.copy(_pairs(self._slabs, tensor, to_host=True))

    def leave(self) -> None:
        """Gives up the tensor on the device, as soon as it is copied."""
        if self._here is not None:
            self._lane.wait_for(self._copied)
            self._check_unchanged()
            self._here = None

    def return_early(self) -> None:
        """Begins to bring the tensor back."""
        if self._here is None:
            self._here = torch.empty_strided(self._shape, self._stride, dtype=self._dtype, device=self._lane.device)
            self._is_original = False
            self._copied = self._lane.copy(_pairs(self._slabs, self._here, to_host=False))

    def fetch(self) -> Tensor:
        """The tensor on the device, without a graph."""
        self.return_early()
        assert self._here is not None
        here = self._here.detach()
        self.leave()
        return here

    def _check_unchanged(self) -> None:
        if self._is_original and self._here is not None and self._here._version != self._version:
            raise RuntimeError(
                f"A tensor of shape {tuple(self._shape)} that a checkpointed layer keeps was changed in place while it "
                "was copied to the host: what is recomputed from it would be wrong. Set checkpoint_offload=None."
            )

    def __del__(self) -> None:
        """Gives back what is still held."""
        if self._here is not None:
            self._lane.wait_for(self._copied)
        self._memory.give_back(self._slabs)


def dense(tensor: Tensor) -> Tensor:
    """A tensor whose elements lie without gaps, in whatever order; the same one if it can be."""
    if torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor):
        raise TypeError(
            f"checkpoint_offload can't move a {type(tensor).__name__} to the host, only plain tensors. Set "
            "checkpoint_offload=None."
        )
    order = sorted(range(tensor.dim()), key=lambda dim: (-tensor.stride(dim), -tensor.shape[dim]))
    return tensor if tensor.permute(order).is_contiguous() else tensor.contiguous()


def _pairs(slabs: list[Tensor], tensor: Tensor, *, to_host: bool) -> list[tuple[Tensor, Tensor]]:
    """(to, from) for every slab; a dense tensor's bytes in the order of its memory."""
    whole = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    pairs, start = [], 0
    for slab in slabs:
        part = whole[start : start + slab.numel()]
        stored = slab[: part.numel()]
        pairs.append((stored, part) if to_host else (part, stored))
        start += slab.numel()
    return pairs


class Lane:
    """The copies between one device and the host, one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # The host's own memory needs no copy in the background.
        self._module: Any = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
        self._stream = None if self._module is None else self._module.Stream(device)

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> Any:
        """Begins to copy when all is done that was begun before; returns what ``wait_for`` waits for."""
        if self._stream is None:
            _copy_all(pairs)
            return None
        # Also before memory is filled: what used it last may still be running.
        self._stream.wait_stream(self._module.current_stream(self.device))
        with self._module.stream(self._stream):
            _copy_all(pairs)
            return self._stream.record_event()

    def wait_for(self, copied: Any) -> None:
        """Lets the computation wait for a copy; the program goes on."""
        if copied is not None:
            self._module.current_stream(self.device).wait_event(copied)

    def mark(self) -> Any:
        """A moment of the computation, for ``seconds_between``."""
        if self._module is None:
            return time.perf_counter()
        event = self._module.Event(enable_timing=True)
        event.record(self._module.current_stream(self.device))
        return event

    def seconds_between(self, start: Any, end: Any) -> float:
        """How long the device computed from one moment to another; waits for the second one."""
        if self._module is None:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


def _copy_all(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for to, source in pairs:
        to.copy_(source, non_blocking=True)


@cache
def lane_of(device: torch.device) -> Lane:
    """The one between a device and the host."""
    return Lane(device)
