"""How many mini-sequences: chunk arithmetic, the paper's rule and ours.

A *token* is one position of one sequence, so a batch of shape (B, S, D) has B * S tokens. ``num_chunks`` is the
paper's M; ``chunk_tokens`` is the length of one mini-sequence.
"""

from __future__ import annotations

from typing import Literal

Chunks = int | Literal["auto", "paper"] | None
"""How a block is split: a number M, a rule that picks M from the sizes, or ``None`` for "leave the block alone"."""

# Below this many tokens a chunk's matmuls no longer fill a device, so splitting further costs time.
_MLP_MIN_TOKENS = 1024
_LM_HEAD_MIN_TOKENS = 512
# The logits of so few tokens cost less than the bookkeeping that would avoid them (generation, short prompts).
_FEW_LOGITS_BYTES = 16 * 2**20


def check_chunks(name: str, value: object) -> None:
    """Raises unless ``value`` is a valid ``Chunks`` setting.

    Args:
        name: the option's name, for the message.
        value: a positive int, ``"auto"``, ``"paper"`` or ``None``.

    Raises:
        ValueError: for anything else.
    """
    if value is None or (isinstance(value, str) and value in ("auto", "paper")):
        return
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return
    raise ValueError(
        f"{name}={value!r} is not a number of mini-sequences. Expected a whole number of at least 1, 'auto', "
        f"'paper', or None to leave the block as it is."
    )


def resolve_num_chunks(num_tokens: int, *, num_chunks: int | None, chunk_tokens: int | None) -> int:
    """Turns either way to ask for chunks into a number of them, at most one per token.

    Args:
        num_tokens: tokens in the whole input.
        num_chunks: how many chunks, or ``None``.
        chunk_tokens: how many tokens at most in a chunk, or ``None``.

    Returns:
        The number of chunks, from 1 to ``max(1, num_tokens)``.

    Raises:
        ValueError: if not exactly one of the two is given, or if it is not a whole number of at least 1.
    """
    if (num_chunks is None) == (chunk_tokens is None):
        raise ValueError(
            f"Give exactly one of num_chunks and chunk_tokens; got num_chunks={num_chunks!r} and "
            f"chunk_tokens={chunk_tokens!r}."
        )
    name, value = ("num_chunks", num_chunks) if num_chunks is not None else ("chunk_tokens", chunk_tokens)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}.")
    wanted = value if num_chunks is not None else -(-num_tokens // value)
    return max(1, min(wanted, num_tokens))


def chunk_bounds(num_tokens: int, num_chunks: int) -> list[tuple[int, int]]:
    """Cuts ``range(num_tokens)`` into consecutive pieces whose lengths differ by at most one.

    No token is left out, whatever divides what.

    Args:
        num_tokens: how many tokens there are.
        num_chunks: how many pieces, from 1 to ``max(1, num_tokens)``.

    Returns:
        ``num_chunks`` pairs (start, stop).
    """
    size, larger = divmod(num_tokens, num_chunks)
    bounds, start = [], 0
    for index in range(num_chunks):
        stop = start + size + (index < larger)
        bounds.append((start, stop))
        start = stop
    return bounds


def mlp_num_chunks(setting: int | str, *, num_tokens: int, hidden_size: int, sparsity: int = 1) -> int:
    """The number of mini-sequences for an MLP.

    ``"paper"`` is the rule of arXiv 2407.15892: mini-sequences of D tokens, none when there are fewer tokens.
    ``"auto"`` splits from 2 * max(D, 1024) tokens on, into chunks of at least max(D, 1024) tokens: chunking costs one
    fp32 accumulator per weight (12 * D * I bytes for a gated MLP) and saves about five half-precision intermediates
    (10 * I bytes per token), so below about two times D tokens it would cost memory, and with fewer than about 1,024
    tokens to a matmul it would cost time. With experts, both are ``sparsity`` times as much.

    Args:
        setting: M itself, ``"auto"`` or ``"paper"``.
        num_tokens: B * S.
        hidden_size: D, the block's input width.
        sparsity: E / k of a mixture of E experts of which each token goes to k; each expert's matmuls see a share
            k / E of a chunk's tokens, and every expert has its accumulators.

    Returns:
        M, at least 1 and at most one per token; 1 means that the block runs as it is.
    """
    if isinstance(setting, int):
        return resolve_num_chunks(num_tokens, num_chunks=setting, chunk_tokens=None)
    if setting == "paper":
        return max(1, -(-num_tokens // hidden_size)) if num_tokens >= hidden_size else 1
    return max(1, num_tokens // (max(hidden_size, _MLP_MIN_TOKENS) * sparsity))


def lm_head_split(setting: int | str, *, hidden_size: int, vocab_size: int) -> dict[str, int]:
    """How an LM head with its loss is split, as the keyword that ``linear_cross_entropy`` takes.

    ``"paper"``: M = V / D, so that a chunk's logits take as many bytes as the hidden states; they grow with S.
    ``"auto"``: at most max(D / 4, 512) tokens in a chunk, so that a chunk's logits take a quarter of the bytes of the
    weight's gradient, which the head needs anyway, and stay constant as S grows.

    Args:
        setting: M itself, ``"auto"`` or ``"paper"``.
        hidden_size: D.
        vocab_size: V.

    Returns:
        ``{"num_chunks": M}`` or ``{"chunk_tokens": c}``.
    """
    if isinstance(setting, int):
        return {"num_chunks": setting}
    if setting == "paper":
        return {"num_chunks": -(-vocab_size // hidden_size)}
    return {"chunk_tokens": max(hidden_size // 4, _LM_HEAD_MIN_TOKENS)}


def few_logits(setting: int | str, *, num_tokens: int, vocab_size: int, element_size: int) -> bool:
    """Whether the whole logits are so small that computing them at once is the cheaper way.

    Args:
        setting: the head's ``Chunks`` setting; an explicit number is always obeyed.
        num_tokens: B * S.
        vocab_size: V.
        element_size: bytes of one logit.

    Returns:
        True for ``"auto"`` and ``"paper"`` when the logits take at most 16 MiB.
    """
    return not isinstance(setting, int) and num_tokens * vocab_size * element_size <= _FEW_LOGITS_BYTES
