"""Memory on the host for tensors that leave the device: slabs of a few sizes, taken once and used again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lightning_mst.ops.free_host_memory import free_host_memory
from lightning_mst.ops.rehearsal import is_rehearsing
from lightning_mst.units import in_words

# torch rounds pinned memory up to powers of two, so that one buffer for a tensor would waste up to half of it (300K
# tokens of 4,096 bf16 numbers: 2.3 GiB, rounded to 4). Slabs waste less than one of them for each tensor, and fit
# tensors of any length. A slab takes 0.6 ms over PCIe at 25 GB/s, long beside the launch of its copy.
SLAB_BYTES = 16 * 2**20
_SMALLEST_BYTES = 64 * 2**10

# So much is left to the rest of the machine: the kernel kills processes without a word when nothing is left.
_RESERVE_BYTES = 256 * 2**20


class NotEnoughHostMemory(RuntimeError):
    """What should be kept on the host does not fit there."""


class HostMemory:
    """A pool of slabs on the host, pinned where the device can copy to pinned memory by itself.

    A slab that is given back is used again; ``release`` gives them all back to the system. A copy of a pool, such as a
    deepcopied or unpickled model has, is a new and empty one.

    Attributes:
        allocated: bytes that the pool has taken from the system.
        in_use: bytes of the slabs that hold something.
    """

    def __init__(self) -> None:
        self.allocated = 0
        self.in_use = 0
        self._free: dict[tuple[int, bool], list[Tensor]] = defaultdict(list)

    def __reduce__(self) -> tuple[type[HostMemory], tuple[()]]:
        """As a new pool."""
        return HostMemory, ()

    def take(self, size: int, device: torch.device) -> list[Tensor]:
        """Slabs for so many bytes.

        Args:
            size: bytes.
            device: where the bytes come from.

        Returns:
            Tensors of bytes (n,), all but the last of the same size, that together hold as many bytes or more.

        Raises:
            NotEnoughHostMemory: the host has no more, or refuses to pin it.
        """
        taken: list[Tensor] = []
        pinned = _can_pin(device)
        try:
            for slab_bytes in _slab_sizes(size):
                slab = self._take_free(slab_bytes, pinned)
                if slab is None:
                    slab = self._allocate(slab_bytes, pinned)
                self.in_use += slab.nbytes
                taken.append(slab)
        except NotEnoughHostMemory:
            self.give_back(taken)
            raise
        return taken

    def give_back(self, slabs: list[Tensor]) -> None:
        """Takes slabs back, whose content is no longer needed."""
        for slab in slabs:
            self.in_use -= slab.nbytes
            if isinstance(slab, FakeTensor):
                # A rehearsal counts what is in use; its tensors belong to it alone.
                self.allocated -= slab.nbytes
            else:
                self._free[slab.nbytes, slab.is_pinned()].append(slab)

    def release(self) -> None:
        """Gives the slabs that hold nothing back to the system."""
        pinned = any(pinned and slabs for (_, pinned), slabs in self._free.items())
        self.allocated -= sum(slab.nbytes for slabs in self._free.values() for slab in slabs)
        self._free.clear()
        if pinned:
            _empty_cache()

    def _take_free(self, size: int, pinned: bool) -> Tensor | None:
        """A slab of this size, or the next larger one that there is."""
        while size <= SLAB_BYTES and not is_rehearsing():
            if free := self._free[size, pinned]:
                return free.pop()
            size *= 2
        return None

    def _allocate(self, size: int, pinned: bool) -> Tensor:
        what = f"{in_words(size)} more of {'pinned ' if pinned else ''}host memory"
        if not is_rehearsing() and (free := free_host_memory()) < size + _RESERVE_BYTES:
            raise NotEnoughHostMemory(f"Asked for {what}, but only {in_words(free)} are free. {self._advice()}")
        try:
            with allocating_on_host():
                slab = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        except RuntimeError as error:
            raise NotEnoughHostMemory(
                f"The system refused {what}, though {in_words(free_host_memory())} are free. {self._advice()}"
                + (" A container may limit what can be pinned (ulimit -l)." if pinned else "")
            ) from error
        self.allocated += size
        return slab

    def _advice(self) -> str:
        return (
            f"{in_words(self.in_use)} are in use for what layers keep (checkpoint_offload). Take shorter sequences, a "
            "smaller batch or fewer processes on this machine, or checkpoint_offload='inputs' or None."
        )


_allocating = False


@contextmanager
def allocating_on_host() -> Iterator[None]:
    """Marks the tensors that are made in the body as memory of the host, wherever the model is."""
    global _allocating
    before, _allocating = _allocating, True
    try:
        yield
    finally:
        _allocating = before


def is_allocating_on_host() -> bool:
    """Whether a tensor that is made now is memory of the host."""
    return _allocating


def _empty_cache() -> None:
    """Lets torch give back the pinned memory that it would keep for itself."""
    if hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache()
    elif hasattr(torch._C, "_host_emptyCache"):  # CUDA's, in releases before
        torch._C._host_emptyCache()


def slabs_bytes(size: int) -> int:
    """Bytes of the slabs for so many bytes; those of a pool that has only larger ones left are more."""
    return sum(_slab_sizes(size))


def _slab_sizes(size: int) -> list[int]:
    whole, rest = divmod(size, SLAB_BYTES)
    sizes = [SLAB_BYTES] * whole
    if rest:
        sizes.append(max(_SMALLEST_BYTES, 1 << (rest - 1).bit_length()))
    # As one in a rehearsal, where only the sum is of interest.
    return [sum(sizes)] if is_rehearsing() and sizes else sizes


def _can_pin(device: torch.device) -> bool:
    # Apple's devices share the host's memory.
    return device.type not in ("cpu", "mps", "meta")
