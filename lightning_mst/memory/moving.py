"""``nn.Module.to`` on fake parameters, which torch itself refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn


@contextmanager
def fake_modules_move() -> Iterator[None]:
    """Lets modules with fake parameters change dtype and device in the body, as PEFT does when it adds adapters.

    A parameter that changes is replaced by another one; tied ones stay tied.
    """
    with patch.object(nn.Module, "_apply", _apply):
        yield


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    replaced: dict[Tensor, Tensor] = {}

    def moved(tensor: Tensor) -> Tensor:
        if tensor not in replaced:
            with torch.no_grad():
                new: Any = fn(tensor)
            same = new.dtype == tensor.dtype and new.device == tensor.device
            if not same and isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, tensor.requires_grad)
            replaced[tensor] = tensor if same else new
        return replaced[tensor]

    for module in self.modules() if recurse else [self]:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = moved(tensor)
    return self
