"""How many tokens' activations are moved, against trying every fraction."""

from __future__ import annotations

import random

import pytest

from lightning_mst.rewrite.token_fraction import largest_token_fraction

GRID = 2000


def fits(fraction: float, case: dict[str, float]) -> bool:
    moved = case["always_bytes"] + fraction * case["all_tokens_bytes"]
    is_hidden = moved <= case["bytes_per_second"] * case["layer_seconds"]
    return is_hidden and moved * case["num_layers"] <= case["host_bytes"]


def tried(case: dict[str, float]) -> float:
    return max((step / GRID for step in range(GRID + 1) if fits(step / GRID, case)), default=0.0)


def random_case(numbers: random.Random) -> dict[str, float]:
    def size(low: float, high: float) -> int:
        return int(10 ** numbers.uniform(low, high))

    return {
        "always_bytes": numbers.choice([0, size(6, 9)]),
        "all_tokens_bytes": numbers.choice([0, size(6, 10)]),
        "bytes_per_second": size(9, 11),
        "layer_seconds": 10 ** numbers.uniform(-3, 0.5),
        "num_layers": numbers.randint(1, 80),
        "host_bytes": size(8, 12),
    }


def test_the_fraction_is_the_largest_that_fits_of_all_that_can_be_tried():
    numbers = random.Random(0)
    cases = [random_case(numbers) for _ in range(500)]
    for case in cases:
        assert largest_token_fraction(**case) == pytest.approx(tried(case), abs=1.01 / GRID), case
    found = [largest_token_fraction(**case) for case in cases]
    assert found.count(0.0) > 50
    assert found.count(1.0) > 50
    assert sum(0 < fraction < 1 for fraction in found) > 50


def test_amounts_that_can_not_be_are_refused():
    case = random_case(random.Random(0))
    with pytest.raises(ValueError, match="negative"):
        largest_token_fraction(**{**case, "host_bytes": -1})
    with pytest.raises(ValueError, match="num_layers=0"):
        largest_token_fraction(**{**case, "num_layers": 0})
