"""Perplexity of the held-out text against the length of the context."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_mst.causal_lm import IGNORE_INDEX
from lightning_mst.data.packing import PackedDataset
from lightning_mst.program.errors import ConfigurationError

__all__ = ["SameTokens", "check_one_device", "context_perplexity", "read_context_lengths", "take_tokens"]


class SameTokens(Dataset):
    """Sequences of one length, of which the same tokens count whatever the length is.

    The first token of a sequence has no context and can't be predicted. So those that begin a sequence of the shortest
    length count in none, and what differs between two lengths is how much of the text before a token is seen.

    Args:
        tokens: ``[num_tokens]``, any integer dtype.
        length: Tokens per sequence.
        shortest: The shortest length, which divides this one.
    """

    def __init__(self, tokens: np.ndarray, *, length: int, shortest: int) -> None:
        self._sequences = PackedDataset(tokens, sequence_length=length)
        self._shortest = shortest

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self._sequences[index]
        item["labels"][:: self._shortest] = IGNORE_INDEX
        return item


def read_context_lengths(config: DictConfig) -> list[int]:
    """The lengths that ``task.context_lengths`` asks for, none for null.

    Raises:
        ConfigurationError: They are not whole numbers in ascending order, of which the first divides all and all
            divide the last; or ``task.context_tokens`` is fewer than the last.
    """
    lengths = config.task.get("context_lengths")
    if lengths is None:
        return []
    lengths = OmegaConf.to_container(lengths) if OmegaConf.is_list(lengths) else lengths
    if not isinstance(lengths, list) or not lengths or not all(_is_length(length) for length in lengths):
        raise ConfigurationError(
            f"task.context_lengths should be a list of whole numbers, 2 or more, such as [512,2048]; got {lengths!r}"
        )
    nested = all(length % lengths[0] == 0 == lengths[-1] % length for length in lengths)
    if not nested or sorted(set(lengths)) != lengths:
        raise ConfigurationError(
            "task.context_lengths should ascend, its first number divide all others and each of them divide the last"
            f" (powers of two do), so that the same tokens are predicted at every length; got {lengths}"
        )
    limit = config.task.context_tokens
    if limit is not None and not (_is_length(limit) and limit >= lengths[-1]):
        raise ConfigurationError(
            f"task.context_tokens should be at least the longest of task.context_lengths={lengths}, or null for all"
            f" of the held-out text; got {limit!r}"
        )
    return lengths


def take_tokens(tokens: np.ndarray, lengths: list[int], limit: int | None) -> np.ndarray:
    """The first tokens of the held-out text, as many as fill whole sequences of every length.

    Args:
        tokens: All, ``[num_tokens]``.
        lengths: From :func:`read_context_lengths`.
        limit: Take at most so many; None for no limit.

    Raises:
        ConfigurationError: They don't fill one sequence of the longest length.
    """
    longest = lengths[-1]
    taken = min(len(tokens), limit or len(tokens)) // longest * longest
    if taken == 0:
        raise ConfigurationError(
            f"task.context_lengths: The held-out text has {len(tokens):,} tokens, fewer than the longest context of"
            f" {longest:,}. Choose shorter ones, or hold out more text (data.validation_fraction)"
        )
    return tokens[:taken]


def check_one_device(trainer: pl.Trainer) -> None:
    """Make sure that every sequence is seen once: several devices would fill their shares up with repeated ones.

    Raises:
        ConfigurationError: The trainer has several devices.
    """
    if trainer.world_size > 1:
        raise ConfigurationError(
            "task.context_lengths: The perplexity against context length is measured on one device, got"
            f" {trainer.world_size}. Set trainer.devices=1, or task.context_lengths=null"
        )


def context_perplexity(
    trainer: pl.Trainer, module: pl.LightningModule, tokens: np.ndarray, lengths: list[int]
) -> dict[str, float]:
    """Evaluate the model on the same tokens, cut into sequences of each length.

    Args:
        trainer: Has trained the module. Logs to nothing from now on, and has no limit on batches.
        module: Logs ``val_perplexity`` when it is validated.
        tokens: From :func:`take_tokens`.
        lengths: In tokens, ascending.

    Returns:
        Length (as a string, as JSON wants its keys) -> perplexity of the tokens that count in all.
    """
    trainer.loggers = []
    trainer.limit_val_batches = 1.0
    found: dict[str, float] = {}
    for length in lengths:
        sequences = SameTokens(tokens, length=length, shortest=lengths[0])
        # Batches of as many tokens at every length take much the same memory and time.
        loader = DataLoader(sequences, batch_size=lengths[-1] // length)
        metrics: Any = trainer.validate(module, dataloaders=loader, verbose=False)
        found[str(length)] = metrics[0]["val_perplexity"]
    return found


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 2
