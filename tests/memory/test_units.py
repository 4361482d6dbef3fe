"""Amounts of memory are read as people write them."""

from __future__ import annotations

import pytest

from lightning_mst.units import in_words, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GiB", 80 * 2**30),
        ("80 GB", 80 * 10**9),
        ("0.5tib", 2**39),
        (" 512 MiB ", 2**29),
        (".5KB", 500),
        ("1024", 1024),
        ("12B", 12),
        (2**33, 2**33),
        (1e9, 10**9),
    ],
)
def test_binary_and_decimal_units_are_told_apart(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "80 GiBs", "-1GiB", "0", "1e3 GiB", "eighty", "0.1B", None, True, "9" * 30]
)
def test_what_is_no_amount_of_memory_is_named_with_what_would_be(text):
    with pytest.raises(ValueError, match="not an amount of memory") as error:
        parse_bytes(text)
    assert repr(text) in str(error.value)
    assert "'80GiB'" in str(error.value)


def test_amounts_are_written_in_gib_and_small_ones_in_mib():
    assert [in_words(size) for size in (3 * 2**29, 2**20, 0)] == ["1.50 GiB", "1.0 MiB", "0.00 GiB"]
