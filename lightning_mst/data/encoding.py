"""Documents -> one array of tokens on disk."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lightning_mst.data.cache import atomic_path, cache_key, default_cache_dir
from lightning_mst.data.documents import Documents
from lightning_mst.data.pieces import cut_text
from lightning_mst.data.tokenizer import tokenizer_fingerprint, vocabulary_size

_PIECE = 1_000_000  # characters; the encoder needs some hundred bytes per token, so a book goes through in pieces
_BATCH = 4_000_000  # characters that are encoded at once, in parallel over the pieces

_log = logging.getLogger(__name__)


def encode_documents(
    documents: Documents,
    tokenizer: Any,
    *,
    max_tokens: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> np.memmap:
    """Encode documents into one stream of tokens, each document followed by the end-of-text token.

    The stream is written to the cache folder as it grows, so that memory stays flat, and is mapped from there. Text
    that spells a special token is encoded as ordinary text: the end-of-text token stands at ends only. Documents
    without text add nothing, not even an end.

    Args:
        documents: The text.
        tokenizer: A transformers tokenizer with an ``eos_token``.
        max_tokens: Stop after so many tokens, in the middle of a document if need be; ``None`` for no limit.
        cache_dir: Where to keep the stream; ``None`` is :func:`~lightning_mst.data.default_cache_dir`.

    Returns:
        ``[num_tokens]``, read-only; uint16 if all token ids fit, else uint32.

    Raises:
        ValueError: There is no text in the documents.
    """
    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32)
    key = cache_key("tokens-1", documents.fingerprint, tokenizer_fingerprint(tokenizer), max_tokens)
    file = Path(cache_dir or default_cache_dir()) / f"tokens-{key}.{dtype.name}"
    if not file.is_file():
        start = time.perf_counter()
        written = 0
        with atomic_path(file) as temporary:
            with temporary.open("wb") as stream:
                for tokens in _encode(documents, tokenizer, dtype=dtype):
                    kept = tokens if max_tokens is None else tokens[: max_tokens - written]
                    stream.write(kept.tobytes())
                    written += len(kept)
                    if written == max_tokens:
                        break
            if written == 0:
                raise ValueError(f"The {len(documents)} documents hold no text. Give at least one that does.")
        _log.info("Encoded %d tokens in %.1f s: %s", written, time.perf_counter() - start, file)
    return np.memmap(file, dtype=dtype, mode="r")


def _encode(texts: Iterable[str], tokenizer: Any, *, dtype: np.dtype) -> Iterator[np.ndarray]:
    for batch in _batches(texts):
        encoded = tokenizer(
            [piece for piece, _ in batch],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a document longer than the tokenizer's model takes is no mistake here
        )["input_ids"]
        for ids, (_, ends_document) in zip(encoded, batch, strict=True):
            yield np.array([*ids, tokenizer.eos_token_id] if ends_document else ids, dtype=dtype)


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Group texts into batches of (piece, whether it ends its document)."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for text in texts:
        if not text.strip():
            continue
        pieces = list(cut_text(text, _PIECE))
        for number, piece in enumerate(pieces, start=1):
            batch.append((piece, number == len(pieces)))
            size += len(piece)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
