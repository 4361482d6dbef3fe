"""What the number of mini-sequences is adapted to while a model trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class Pace:
    """Shared by all rewritten blocks of a model.

    Attributes:
        factor: how many times as many mini-sequences as the settings say; doubled where memory ran out.
        stretch: the most tokens that any rank has in this step, over the tokens of this rank. Ranks with sequences of
            different lengths then agree on the number of mini-sequences.
    """

    factor: int = 1
    stretch: float = 1.0

    def stretched(self, num_tokens: int) -> int:
        """The tokens by which a number of mini-sequences is chosen."""
        return math.ceil(num_tokens * self.stretch)

    def split(self, split: Mapping[str, int]) -> dict[str, int]:
        """``{"num_chunks": M}`` or ``{"chunk_tokens": c}`` with ``factor`` times as many mini-sequences."""
        if "num_chunks" in split:
            return {"num_chunks": split["num_chunks"] * self.factor}
        return {"chunk_tokens": max(1, split["chunk_tokens"] // self.factor)}
