"""Public implementations of the same blocks, one file per project, imported only when they are measured.

Each function takes the block's tensors and returns a step, or raises ``CannotRun`` with one line that says why.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch


class CannotRun(Exception):
    """Why a peer can't run here."""


def require(module: str, device: torch.device, *, needs_gpu: bool = False) -> None:
    """Raises ``CannotRun`` unless a package is there and can run on the device."""
    if find_spec(module) is None:
        raise CannotRun(f"{module} is not installed: pip install 'lightning-mst[peers]'")
    if needs_gpu and device.type != "cuda":
        raise CannotRun("its Triton kernels need a CUDA device")
