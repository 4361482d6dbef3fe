"""The longest sequence, and the smallest number of mini-sequences, with which a step fits."""

from __future__ import annotations

import math
from collections.abc import Callable

LONGEST = 2**24
"""Tokens; nobody needs to know about longer ones."""
_FIRST, SHORTEST = 1024, 32
# A length is good when it leaves this share of what sequences have unused, or when one that is so much longer is too
# long.
_UNUSED, _SHARE, _TOKENS = 1 / 200, 1 / 200, SHORTEST


def longest(total: Callable[[int], int], budget: int, *, limit: int = LONGEST, expected: int = 0) -> int:
    """Finds the longest sequence whose step fits, to within 0.5 % or 32 tokens.

    Memory grows with the length, nearly linearly, so a straight line through two lengths is a good guess of the third.

    Args:
        total: from a length to the bytes that it takes.
        budget: the bytes that there are.
        limit: the longest length to try.
        expected: a length that is likely to be near; saves tries if it is.

    Returns:
        The length, or 0 if even a few tokens are too many.
    """
    tried: dict[int, int] = {}

    def at(length: int) -> int:
        if length not in tried:
            tried[length] = total(length)
        return tried[length]

    fits, too_long = 0, 0
    guess = min(_FIRST, limit)
    while True:
        if at(guess) <= budget:
            fits = guess
        else:
            too_long = guess
        is_full = bool(fits) and budget - at(fits) <= _UNUSED * (budget - min(tried.values()))
        is_narrow = bool(too_long) and too_long - fits <= max(_TOKENS, _SHARE * too_long)
        if fits == limit or is_full or is_narrow:
            break
        guess = _next(tried, budget, fits, too_long, limit, expected)
    return fits


def _next(tried: dict[int, int], budget: int, fits: int, too_long: int, limit: int, expected: int) -> int:
    if len(tried) == 1:
        # If that doesn't fit either, nothing does.
        return min(limit, expected if expected > fits else 8 * fits) if fits else min(SHORTEST, too_long - 1)
    lengths = sorted(tried)
    # The two lengths nearest to the one that is wanted.
    low, high = (fits, too_long) if fits and too_long else (lengths[-2:] if fits else lengths[:2])
    slope = (tried[high] - tried[low]) / (high - low)
    if slope <= 0:
        return (fits + too_long) // 2 if too_long else min(limit, 8 * high)
    # A little less than full, so that the guess fits if the line is straight.
    spare = (budget - min(tried.values())) * _UNUSED / 2
    guess = int(low + (budget - spare - tried[low]) / slope)
    if not too_long:
        # In steps, the way there seems ever shorter: go twice as far.
        return min(limit, max(fits + 1, 2 * guess - fits if len(tried) > 3 else guess))
    if fits and len(tried) > 4 and (len(tried) % 2 or len(tried) > 7):
        # The line is not straight: halve the gap.
        guess = (fits + too_long) // 2
    return max(fits + 1, min(too_long - 1, guess))


def least_number(total: Callable[[int], int], budget: int, most: int) -> int:
    """Finds the smallest number of mini-sequences with which a step fits.

    What a block takes is a constant and a part that shrinks with the number: bytes are linear in its reciprocal.

    Args:
        total: from a number to the bytes that it takes.
        budget: the bytes that there are.
        most: a number that suffices.

    Returns:
        The number, 1 or more.
    """
    if most == 1 or total(1) <= budget:
        return 1
    too_few, enough = 1, most
    tries = 0
    while enough - too_few > 1:
        low, high = total(too_few), total(enough)
        share = (low - budget) / (low - high)  # of the way from 1 / too_few to 1 / enough
        guess = math.ceil(1 / (1 / too_few + share * (1 / enough - 1 / too_few)))
        tries += 1
        if tries % 2 == 0:  # where another block takes over, the curve has a bend
            guess = math.isqrt(too_few * enough)
        guess = max(too_few + 1, min(enough - 1, guess))
        if total(guess) <= budget:
            enough = guess
        else:
            too_few = guess
    return enough
