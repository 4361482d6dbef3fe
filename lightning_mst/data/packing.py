"""One array of tokens -> training sequences of one length."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class PackedDataset(Dataset):
    """Cuts a stream of tokens into consecutive sequences of exactly ``sequence_length`` tokens.

    Sequences do not overlap and hold no padding, so every position costs compute once and counts in the loss. A
    sequence may hold several documents, separated by the end-of-text token, and attention sees across that token.
    The tokens at the end that do not fill a sequence are left out; ``dropped_tokens`` counts them.

    Each item is ``{"input_ids": [sequence_length], "labels": [sequence_length]}``, both int64 and equal: models of
    transformers shift the labels inside their loss, so a sequence gives ``sequence_length - 1`` predictions.

    Args:
        tokens: ``[num_tokens]``, any integer dtype; may be memory-mapped, and is then mapped again, not copied, in
            the worker processes of a DataLoader.
        sequence_length: Tokens per sequence, at least 2.

    Attributes:
        num_tokens: Tokens in all sequences together.
        dropped_tokens: Tokens left out at the end, fewer than ``sequence_length``.

    Raises:
        ValueError: ``sequence_length`` is less than 2 or the tokens are fewer than one sequence.
    """

    def __init__(self, tokens: np.ndarray, *, sequence_length: int) -> None:
        if sequence_length < 2:
            raise ValueError(
                f"sequence_length must be at least 2 (a token and the next one to predict), got {sequence_length}."
            )
        if len(tokens) < sequence_length:
            raise ValueError(
                f"The text has {len(tokens)} tokens, fewer than one sequence of {sequence_length}. Lower "
                f"sequence_length to at most {len(tokens)}, or give more text."
            )
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.dropped_tokens = len(tokens) % sequence_length
        self.num_tokens = len(tokens) - self.dropped_tokens

    def __len__(self) -> int:
        return self.num_tokens // self.sequence_length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} sequences")
        start = (index % len(self)) * self.sequence_length
        window = self.tokens[start : start + self.sequence_length].astype(np.int64)  # (S,), a copy
        input_ids = torch.from_numpy(window)
        return {"input_ids": input_ids, "labels": input_ids.clone()}

    def __getstate__(self) -> dict[str, Any]:
        # Pickled as an array, a mapped file would be copied whole into every worker that starts by spawning.
        state = self.__dict__.copy()
        tokens = self.tokens
        if isinstance(tokens, np.memmap) and _is_whole_file(tokens):
            state["tokens"] = (tokens.filename, tokens.offset, tokens.dtype.str, tokens.shape)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.tokens, tuple):
            filename, offset, dtype, shape = self.tokens
            self.tokens = np.memmap(filename, dtype=dtype, mode="r", offset=offset, shape=shape)


def _is_whole_file(tokens: np.memmap) -> bool:
    # A view of a mapped file is a memmap too, but no longer knows which part of the file it shows.
    return isinstance(tokens.base, mmap.mmap) and tokens.ndim == 1 and tokens.filename is not None
