"""The file that every run leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

__all__ = ["read_result", "remove_result", "write_failure", "write_result"]

_NAME = "result.json"


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write ``result.json`` into a run's folder; numbers that JSON does not know (nan, infinity) become null."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _NAME).write_text(_json(result), encoding="utf-8")


def write_failure(folder: Path, error: str, rank: int = 0) -> bool:
    """Write a ``result.json`` that says why a run failed, if there is none yet.

    Args:
        folder: The run's folder.
        error: What happened, in a line.
        rank: Of the process that it happened to.

    Returns:
        False if another process of the run has been faster.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / _NAME).open("x", encoding="utf-8") as file:
            file.write(_json({"status": "failed", "error": error, "rank": rank}))
    except FileExistsError:
        return False
    return True


def read_result(folder: Path) -> dict[str, Any] | None:
    """What ``result.json`` in a run's folder says, or None if there is none."""
    path = folder / _NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def remove_result(folder: Path) -> None:
    """Make sure that an old result does not stand for a new run."""
    (folder / _NAME).unlink(missing_ok=True)


def _json(result: dict[str, Any]) -> str:
    return json.dumps(_finite(result), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
