"""The largest number for which something fits, where a try tells only whether it does."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

__all__ = ["largest"]


def largest(fits: Callable[[int], bool], *, start: int, grain: int = 1, least: int = 1) -> int:
    """Find the largest number that fits, to within ``grain``: from ``start`` in doubling steps, then by bisection.

    Args:
        fits: Whether a number fits. What is less than one that fits has to fit as well.
        start: Where the answer is likely to be near.
        grain: How far below the first number that does not fit the answer may be.
        least: The smallest number that is of use.

    Returns:
        A number that fits, or 0 if none was found from ``least`` on.
    """
    step, low, high = grain, 0, max(start, least)
    if fits(high):
        low, high = high, high + step
        while fits(high):
            step *= 2
            low, high = high, high + step
    else:
        while high > least:
            tried = max(least, high - step)
            if fits(tried):
                low = tried
                break
            step *= 2
            high = tried
    if low == 0:
        return 0
    between = range(low + grain, high, grain)
    return low + grain * bisect_left(between, True, key=lambda number: not fits(number))
