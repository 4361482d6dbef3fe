"""Standing in for a method of an object for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

__all__ = ["wrapped"]


@contextmanager
def wrapped(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Lets a function run in place of a method while the body runs.

    Args:
        owner: an object, whose class stays as it is.
        name: the method.
        wrapper: called with the method and then the method's arguments.

    Yields:
        The method without the wrapper.
    """
    entries = owner.__dict__
    before = {name: entries[name]} if name in entries else {}
    original = getattr(owner, name)
    entries[name] = partial(wrapper, original)
    try:
        yield original
    finally:
        del entries[name]
        entries.update(before)
