"""Training and evaluation mode, borrowed for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn


def eval_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Runs the body with every module in evaluation mode, then gives each its own mode back.

    Modules with quantized weights stay as they are: one may pack its weight anew at the first evaluation, into a form
    that has no gradient.
    """
    return _mode(model, False)


def train_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Runs the body with every module in training mode, then gives each its own mode back."""
    return _mode(model, True)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        if all(type(p) is nn.Parameter for p in module.parameters(recurse=False)):
            module.training = training
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
