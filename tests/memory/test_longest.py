"""The longest sequence and the smallest number of mini-sequences are found in few tries."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lightning_mst.memory.longest import LONGEST, least_number, longest

GIB = 2**30


def counted(function: Callable[[int], float]) -> tuple[Callable[[int], int], set[int]]:
    tried: set[int] = set()

    def total(number: int) -> int:
        tried.add(number)
        return int(function(number))

    return total, tried


CURVES = {
    "straight": lambda s: 45 * GIB + 400_000 * s,
    "steep": lambda s: 45 * GIB + 8_000_000 * s,
    "with a bend": lambda s: max(48 * GIB + 20_000 * s, 30 * GIB + 600_000 * s),
    "quadratic": lambda s: 10 * GIB + 50 * s * s,
    "in steps": lambda s: 45 * GIB + 400_000 * 4096 * -(-s // 4096),
}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("expected", [0, 20_000])
def test_the_longest_length_is_found_to_half_a_percent_in_a_few_tries(name, expected):
    curve = CURVES[name]
    total, tried = counted(curve)

    found = longest(total, 80 * GIB, expected=expected)

    assert curve(found) <= 80 * GIB
    assert curve(int(found * 1.005) + 32) > 80 * GIB or 80 * GIB - curve(found) < 0.005 * 80 * GIB
    assert found in tried
    assert len(tried) <= 16
    if name == "straight":
        assert len(tried) <= 4


def test_a_length_that_was_expected_and_fits_well_is_the_answer_at_once():
    total, tried = counted(CURVES["straight"])
    best = longest(total, 80 * GIB)
    tried.clear()

    assert longest(total, 80 * GIB, expected=best) == best
    assert tried == {1024, best}


def test_nothing_fits_a_device_that_is_full_before_the_first_token():
    assert longest(CURVES["straight"], 40 * GIB) == 0


def test_a_device_with_room_for_a_few_tokens_gets_them():
    assert 0 < longest(CURVES["steep"], 45 * GIB + 8_000_000 * 300) <= 300


def test_no_more_tokens_are_tried_than_a_model_has_positions():
    total, tried = counted(lambda s: s)
    assert longest(total, GIB, limit=2048) == 2048
    assert max(tried) == 2048
    assert longest(lambda s: 1, GIB) == LONGEST


@pytest.mark.parametrize(
    "curve",
    [
        lambda m: 40 + 1000 / m,
        lambda m: max(40 + 1000 / m, 70),
        lambda m: 79.9 + 1000 / m,
        lambda m: 40 + 1000 / -(-m // 3),
        lambda m: 60.0,
    ],
)
def test_one_mini_sequence_less_than_the_smallest_number_does_not_fit(curve):
    tried: set[int] = set()

    def total(number: int) -> float:
        tried.add(number)
        return curve(number)

    found = least_number(total, 80, 16384)

    assert curve(found) <= 80
    assert found == 1 or curve(found - 1) > 80
    assert len(tried) <= 20
