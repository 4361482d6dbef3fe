"""Hooks that users and engines put on modules."""

from __future__ import annotations

from torch import nn


def has_pre_hooks(module: nn.Module) -> bool:
    """Whether somebody sees or changes what a module is given, or that input's gradient."""
    return bool(module._forward_pre_hooks or module._backward_hooks)


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody sees or changes what a module is given, what it returns, or a gradient of these."""
    return has_pre_hooks(module) or bool(module._forward_hooks or module._backward_pre_hooks)


def is_hooked_inside(module: nn.Module) -> bool:
    """Whether a part of a module is hooked."""
    return any(is_hooked(part) for part in module.modules() if part is not module)
