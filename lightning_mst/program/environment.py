"""Where and with what something was measured."""

from __future__ import annotations

import datetime
import platform
from typing import Any

import lightning
import torch
import transformers

import lightning_mst

__all__ = ["device_name", "environment"]


def environment() -> dict[str, Any]:
    """``device`` (its name), ``versions`` (package -> version) and ``date`` (of today, in ISO form)."""
    packages = (torch, transformers, lightning, lightning_mst)
    return {
        "device": device_name(),
        "versions": {package.__name__: str(package.__version__) for package in packages},
        "date": datetime.date.today().isoformat(),
    }


def device_name() -> str:
    """The GPU's name, or the kind of CPU with the threads that torch uses of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}, {platform.machine()}"
