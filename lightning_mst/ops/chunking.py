"""How many mini-sequences: chunk arithmetic, the paper's rule and ours.

A *token* is one position of one sequence, so a batch of shape (B, S, D) has B * S tokens. ``num_chunks`` is the
paper's M; ``chunk_tokens`` is the length of one mini-sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Chunks = int | Literal["auto", "paper"] | None
"""How a block is split, by a number M or a rule that picks M from the sizes; ``None`` leaves the block alone."""

# Below this many tokens a chunk's matmuls no longer fill a device, so splitting further costs time.
MLP_MIN_TOKENS = 1024
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


@dataclass(frozen=True)
class BlockCost:
    """What splitting a block saves and costs in memory.

    Attributes:
        per_token: bytes that the whole block keeps inside for the backward pass of each token.
        per_split: bytes that splitting adds, however many chunks: the weights' gradients are summed up in fp32, beside
            one weight's gradient of one chunk.
    """

    per_token: int
    per_split: int

    def pays(self, num_tokens: int, num_chunks: int) -> bool:
        """Whether a split saves more than it costs."""
        return self.per_token * (num_tokens - -(-num_tokens // num_chunks)) > self.per_split


def mlp_num_chunks(
    setting: int | str, *, num_tokens: int, hidden_size: int, sparsity: int = 1, cost: BlockCost | None = None
) -> int:
    """The number of mini-sequences for an MLP.

    ``"paper"`` is the rule of arXiv 2407.15892: mini-sequences of D tokens, none when there are fewer tokens.
    ``"auto"`` takes as many as keep the device busy, which holds the block's inside far below the layer's other parts,
    and one where splitting would cost memory. A chunk has at least 1,024 tokens, below which its matmuls no longer
    fill a device, and at least D where weights are trained: every chunk reads and writes their fp32 sums. With experts,
    both are ``sparsity`` times as much.

    Args:
        setting: M itself, ``"auto"`` or ``"paper"``.
        num_tokens: B * S.
        hidden_size: D, the block's input width.
        sparsity: E / k of a mixture of E experts of which each token goes to k; each expert's matmuls see a share
            k / E of a chunk's tokens, and every expert has its sums.
        cost: what a split saves and costs, where it is known.

    Returns:
        M, at least 1 and at most one per token; 1 means that the block is not split.
    """
    if isinstance(setting, int):
        return resolve_num_chunks(num_tokens, num_chunks=setting, chunk_tokens=None)
    if setting == "paper":
        return max(1, -(-num_tokens // hidden_size)) if num_tokens >= hidden_size else 1
    is_frozen = cost is not None and cost.per_split == 0
    least = MLP_MIN_TOKENS if is_frozen else max(hidden_size, MLP_MIN_TOKENS)
    num_chunks = max(1, num_tokens // (least * sparsity))
    return num_chunks if cost is None or cost.pays(num_tokens, num_chunks) else 1


def lm_head_split(
    setting: int | str, *, hidden_size: int, vocab_size: int, num_tokens: int, cost: BlockCost
) -> dict[str, int]:
    """How an LM head with its loss is split, as the keyword that ``linear_cross_entropy`` takes.

    ``"paper"``: M = V / D, so that a chunk's logits take as many bytes as the hidden states; they grow with S.
    ``"auto"``: at most max(D / 4, 512) tokens in a chunk, so that a chunk's logits take a quarter of the bytes of the
    weight's gradient, which the head needs anyway, and stay constant as S grows; one chunk where splitting would cost
    memory.

    Args:
        setting: M itself, ``"auto"`` or ``"paper"``.
        hidden_size: D.
        vocab_size: V.
        num_tokens: B * S.
        cost: what a split saves and costs.

    Returns:
        ``{"num_chunks": M}`` or ``{"chunk_tokens": c}``.
    """
    if isinstance(setting, int):
        return {"num_chunks": setting}
    if setting == "paper":
        return {"num_chunks": -(-vocab_size // hidden_size)}
    # The sums and what becomes of them outlive the chunks' logits, however few those are.
    if cost.per_token * num_tokens < cost.per_split:
        return {"num_chunks": 1}
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
