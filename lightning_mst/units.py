"""Amounts of memory, read and written."""

from __future__ import annotations

import re

GIB = 2**30
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}B": 1000**n for n, p in enumerate("KMGT", start=1)}
_UNITS |= {f"{p}iB": 1024**n for n, p in enumerate("KMGT", start=1)}
_NAMES = {name.lower(): size for name, size in _UNITS.items()}


def parse_bytes(memory: str | int | float) -> int:
    """Reads an amount of memory.

    Args:
        memory: bytes, or a number with a unit: ``"80GiB"`` (2**30 bytes each), ``"80 GB"`` (10**9 bytes each),
            ``"512MiB"``, ... An "80 GB" card has 80 GiB, of which torch can use a little more than 79.

    Returns:
        Bytes.

    Raises:
        ValueError: it is not an amount of memory, or not more than none.
    """
    size = 0.0
    if isinstance(memory, (int, float)) and not isinstance(memory, bool):
        size = float(memory)
    elif isinstance(memory, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", memory)
        if match and match[2].lower() in _NAMES:
            size = float(match[1]) * _NAMES[match[2].lower()]
    if not 1 <= size < 2**63:
        raise ValueError(
            f"{memory!r} is not an amount of memory. Expected a number with a unit, such as '80GiB' (2**30 bytes "
            "each), '80GB' (10**9 bytes each) or '512MiB', or a number of bytes."
        )
    return int(size)


def in_words(size: int) -> str:
    """A number of bytes for people, such as ``2.31 GiB`` or ``63.5 MiB``."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 or size == 0 else f"{size / 2**20:,.1f} MiB"
