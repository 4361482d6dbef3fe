"""Tokenizers: trained on the documents at hand and cached, or loaded by name."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_mst.data.cache import atomic_path, cache_key, default_cache_dir
from lightning_mst.data.documents import Documents
from lightning_mst.data.pieces import cut_text

END_OF_TEXT = "<|endoftext|>"
"""The token that a trained tokenizer puts at the end of each document."""

MIN_VOCAB_SIZE = 257
"""The smallest vocabulary of a trained tokenizer: every byte, and the end-of-text token."""

TRAINING_CHARACTERS = 16_000_000
"""How much text a tokenizer is trained on at most: more changes few merges and costs seconds."""

_PIECE = 100_000  # characters

_log = logging.getLogger(__name__)


def train_tokenizer(
    documents: Documents, *, vocab_size: int = 8192, cache_dir: str | os.PathLike[str] | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, or load it if these documents were seen before.

    Byte-level means that any text can be encoded and decodes to itself. Training reads the documents in order up to
    the first ``TRAINING_CHARACTERS`` (16 million) characters, so it takes seconds for a corpus of any size and gives
    the same tokenizer every time. The result is cached under the hash of the documents, the vocabulary size and
    the version of ``tokenizers``.

    Args:
        documents: The text to learn from; training text only, so that validation stays unseen.
        vocab_size: Largest number of tokens, the 256 bytes and the end-of-text token included. A small text has
            fewer pairs to merge and gives fewer tokens.
        cache_dir: Where to keep it; ``None`` is :func:`~lightning_mst.data.default_cache_dir`.

    Returns:
        The tokenizer. Its ``eos_token`` and ``bos_token`` are ``END_OF_TEXT``, and it adds neither by itself.

    Raises:
        ValueError: ``vocab_size`` is less than 257.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes and the end-of-text token), got {vocab_size}."
        )
    key = cache_key("tokenizer-1", documents.fingerprint, TRAINING_CHARACTERS, vocab_size, tokenizers.__version__)
    file = Path(cache_dir or default_cache_dir()) / f"tokenizer-{key}.json"
    if not file.is_file():
        start = time.perf_counter()
        backend = _train_bpe(documents, vocab_size=vocab_size)
        with atomic_path(file) as temporary:
            backend.save(str(temporary))
        _log.info(
            "Trained a tokenizer of %d tokens in %.1f s: %s",
            backend.get_vocab_size(),
            time.perf_counter() - start,
            file,
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_file(str(file)), eos_token=END_OF_TEXT, bos_token=END_OF_TEXT
    )


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer by its name on the Hugging Face hub or from a local folder.

    Raises:
        FileNotFoundError: There is none, or the hub cannot be reached.
        ValueError: It has no end-of-text token, which packing needs between documents.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"There is no tokenizer under {name!r}: it is no local folder with a tokenizer's files, and the hub does "
            f"not have it or cannot be reached ({error}). Check the name, or set tokenizer=None to train one."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {name!r} has no end-of-text token (eos_token), which separates documents. Choose the "
            "tokenizer of a language model, or save this one to a folder with an eos_token."
        )
    return tokenizer


def vocabulary_size(tokenizer: Any) -> int:
    """Return the rows that an embedding needs for ``tokenizer``: its largest token id + 1.

    This is more than ``len(tokenizer)`` if the ids have gaps.
    """
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a hash of all that decides how ``tokenizer`` encodes a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return cache_key(backend.to_str(), tokenizer.eos_token_id)
    # Written in Python: its class and its name stand for its rules.
    vocabulary = sorted(tokenizer.get_vocab().items())
    return cache_key(type(tokenizer).__qualname__, tokenizer.name_or_path, vocabulary, tokenizer.eos_token_id)


def _train_bpe(documents: Documents, *, vocab_size: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_first_characters(documents, TRAINING_CHARACTERS), trainer)
    return backend


def _first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield from cut_text(text[:limit], _PIECE)  # one long book would occupy one core only
        limit -= len(text)
        if limit <= 0:
            return
