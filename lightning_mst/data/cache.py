"""The folder that keeps trained tokenizers and encoded text between runs."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def default_cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/lightning_mst``, or ``~/.cache/lightning_mst`` when the variable is not set."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "lightning_mst"


def cache_key(*parts: object) -> str:
    """Return 20 hex digits that stand for ``parts``, compared by their ``str``."""
    digest = hashlib.sha256()
    for part in parts:
        data = str(part).encode()
        digest.update(len(data).to_bytes(8, "little"))  # so that ("ab", "c") and ("a", "bc") differ
        digest.update(data)
    return digest.hexdigest()[:20]


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Give a temporary path to write to, which becomes ``target`` only if the block succeeds.

    Readers see no file or the whole file, and of two processes that write the same target the last one wins.

    Args:
        target: The file to create or replace. Its folder is created.

    Yields:
        A path in the same folder, free to create; what was written there is removed if the block raises.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
