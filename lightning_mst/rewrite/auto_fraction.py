"""``offload_fraction="auto"``: the fraction of the tokens, from what a first pass takes."""

from __future__ import annotations

from itertools import pairwise
from statistics import median
from typing import Any

import torch

from lightning_mst.ops.free_host_memory import free_host_memory, processes_here
from lightning_mst.ops.host_memory import SLAB_BYTES, HostMemory
from lightning_mst.ops.moved import Moved, lane_of
from lightning_mst.ops.region import Region
from lightning_mst.rewrite.token_fraction import largest_token_fraction

# A trial copies as much as a layer does, within these bounds: shorter ones measure the launch, longer ones take memory.
_TRIAL_BYTES = (SLAB_BYTES // 16, 4 * SLAB_BYTES)
# Slabs are a little larger than what they hold, and other programs need memory, too.
_USABLE = 0.9


class AutoFraction:
    """Measures one pass of each length, in which nothing more is moved, and chooses for the following ones.

    Args:
        num_layers: how many layers move.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._chosen: dict[int, float] = {}
        self._tokens = 0
        self._starts: list[Any] = []
        self._always_bytes = self._movable_bytes = 0

    def begin(self, tokens: int, device: torch.device, memory: HostMemory, *, is_first: bool) -> float:
        """The fraction for a layer that begins now.

        Args:
            tokens: B * S.
            device: where it runs.
            memory: the pool.
            is_first: whether no layer before it waits for its backward pass.
        """
        if tokens not in self._chosen and is_first:
            if tokens == self._tokens and len(self._starts) > 1:
                self._chosen[tokens] = self._choose(device, memory)
            self._tokens, self._starts = tokens, []
        if tokens in self._chosen:
            return self._chosen[tokens]
        if tokens == self._tokens:
            self._starts.append(lane_of(device).mark())
        return 0.0

    def end(self, region: Region) -> None:
        """Takes note of what a layer has moved, and could have moved."""
        self._always_bytes, self._movable_bytes = region.host_bytes, region.movable_bytes

    def _choose(self, device: torch.device, memory: HostMemory) -> float:
        lane = lane_of(device)
        return largest_token_fraction(
            always_bytes=self._always_bytes,
            all_tokens_bytes=self._movable_bytes,
            bytes_per_second=copied_per_second(device, self._always_bytes),
            layer_seconds=median(lane.seconds_between(start, end) for start, end in pairwise(self._starts)),
            num_layers=self._num_layers,
            host_bytes=int(_USABLE * (free_host_memory() / processes_here() + memory.allocated)),
        )


def copied_per_second(device: torch.device, size: int) -> float:
    """Bytes per second of a copy from a device to the host, tried.

    Args:
        device: the device.
        size: bytes of a usual copy.
    """
    lane, memory = lane_of(device), HostMemory()
    size = min(max(size, _TRIAL_BYTES[0]), _TRIAL_BYTES[1])
    tensor = torch.empty(size, dtype=torch.uint8, device=device)
    Moved(tensor, memory).leave()  # its slabs are there now
    start = lane.mark()
    Moved(tensor, memory).leave()
    seconds = lane.seconds_between(start, lane.mark())
    memory.release()
    return size / seconds
