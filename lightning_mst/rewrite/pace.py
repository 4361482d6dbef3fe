"""What the number of mini-sequences is adapted to while a model trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class Pace:
    """Shared by all rewritten blocks of a model.

    Attributes:
        factor: how many times as many mini-sequences as the settings say; doubled where memory ran out.
        longest: the most tokens in any rank's batch. Ranks whose batches differ in length agree by it on the number of
            mini-sequences.
        own: the tokens in this rank's batch.
        shared: whether there are ranks with other batches, which a number of mini-sequences must suit as well: it is
            then obeyed even where this rank has fewer tokens.
    """

    factor: int = 1
    longest: int = 1
    own: int = 1
    shared: bool = False

    def longest_of(self, num_tokens: int) -> int:
        """How many tokens a block has on the rank with the longest batch, given those that it has here."""
        return -(-num_tokens * self.longest // self.own)

    def split(self, split: Mapping[str, int]) -> dict[str, int]:
        """``{"num_chunks": M}`` or ``{"chunk_tokens": c}`` with ``factor`` times as many mini-sequences."""
        if "num_chunks" in split:
            return {"num_chunks": split["num_chunks"] * self.factor}
        return {"chunk_tokens": max(1, split["chunk_tokens"] // self.factor)}
