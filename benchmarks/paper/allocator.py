"""torch's caching allocator for CUDA, replayed: which of its memory can't be used when it is asked for.

Written from its documentation and the rules stated in ``c10/cuda/CUDACachingAllocator.cpp`` (torch 2.3), with no
options set. Requests of up to 1 MiB live in segments of 2 MiB; larger ones in segments of 20 MiB, or, from 10 MiB on,
in one of their own size. A request takes the smallest free block that is large enough and splits it, unless what is
left is too small to be of use; neighbours that are both free become one block. When the device has no room for another
segment, all segments without a used block are given back.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

MIB = 2**20


class OutOfMemory(Exception):
    """There is no room for a request."""


@dataclass(eq=False)
class Block:
    """A part of a segment.

    Attributes:
        size: bytes.
        address: where it begins.
        pool: the sizes below which requests share segments, or the others: ``0`` or ``1``.
        before: the block in front of it in its segment.
        after: the block behind it in its segment.
        used: whether a tensor lives there.
    """

    size: int
    address: int
    pool: int
    before: Block | None = None
    after: Block | None = None
    used: bool = False


class CachingAllocator:
    """Hands out blocks of a device's memory.

    Args:
        capacity: bytes that are left for segments.

    Attributes:
        reserved: bytes of all segments.
    """

    def __init__(self, capacity: int) -> None:
        self.reserved = 0
        self._capacity = capacity
        self._end = 0
        # Sizes and addresses of each pool's free blocks, in order.
        self._free: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        self._blocks: dict[int, Block] = {}

    def allocate(self, size: int) -> Block:
        """Finds room for a tensor.

        Raises:
            OutOfMemory: there is none.
        """
        size = max(512, -(-size // 512) * 512)
        pool = int(size > MIB)
        block = self._smallest(size, pool) or self._new_segment(size, pool)
        rest = block.size - size
        if rest > (MIB if pool else 511):
            behind = Block(rest, block.address + size, pool, block, block.after)
            if block.after is not None:
                block.after.before = behind
            block.size, block.after = size, behind
            self._put(behind)
        block.used = True
        return block

    def free(self, block: Block) -> None:
        """Takes a block back."""
        block.used = False
        if block.before is not None and not block.before.used:
            self._take(block.before)
            block = _joined(block.before, block)
        if block.after is not None and not block.after.used:
            self._take(block.after)
            block = _joined(block, block.after)
        self._put(block)

    def _put(self, block: Block) -> None:
        self._blocks[block.address] = block
        insort(self._free[block.pool], (block.size, block.address))

    def _take(self, block: Block) -> None:
        free = self._free[block.pool]
        del free[bisect_left(free, (block.size, block.address))]
        del self._blocks[block.address]

    def _smallest(self, size: int, pool: int) -> Block | None:
        free = self._free[pool]
        index = bisect_left(free, (size, 0))
        return self._blocks.pop(free.pop(index)[1]) if index < len(free) else None

    def _new_segment(self, size: int, pool: int) -> Block:
        segment = 2 * MIB if not pool else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        if self.reserved + segment > self._capacity:
            self._give_back()
        if self.reserved + segment > self._capacity:
            raise OutOfMemory(f"{size} bytes are wanted, {self.reserved} of {self._capacity} reserved")
        self.reserved += segment
        self._end += segment
        return Block(segment, self._end - segment, pool)

    def _give_back(self) -> None:
        for block in list(self._blocks.values()):
            if block.before is None and block.after is None:
                self._take(block)
                self.reserved -= block.size


def _joined(block: Block, behind: Block) -> Block:
    block.size += behind.size
    block.after = behind.after
    if behind.after is not None:
        behind.after.before = block
    return block
