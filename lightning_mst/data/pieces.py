"""A long text -> pieces that a tokenizer handles in parallel and in little memory."""

from __future__ import annotations

from collections.abc import Iterator


def cut_text(text: str, limit: int) -> Iterator[str]:
    """Cut a long text before line ends into pieces of at most ``limit`` characters.

    A cut right before a run of white space changes no token of a GPT-2 style byte-level BPE, the trained tokenizer
    included, because its rules never join a word to the white space that follows. A text without such a place is cut
    at the limit.
    """
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start + 1, start + limit)
        while end > 0 and text[end - 1].isspace():
            end = text.rfind("\n", start + 1, end)
        if end < 0:
            end = start + limit
        yield text[start:end]
        start = end
    yield text[start:]
