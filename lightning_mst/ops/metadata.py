"""Which torch functions ask a tensor for something other than its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; those of inference mode don't count it."""
    return -1 if tensor.is_inference() else tensor._version


def getter_name(func: Any) -> str | None:
    """The attribute's name, if a torch function is the getter or setter of one."""
    owner = getattr(func, "__self__", None)
    return getattr(owner, "__name__", None) if getattr(func, "__name__", "") == "__get__" else None


def needs_no_values(func: Callable[..., Any]) -> bool:
    """Whether a torch function asks for a shape, a dtype or the like."""
    return func in _FUNCTIONS or getter_name(func) in _ATTRIBUTES


_FUNCTIONS = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.ndimension,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.get_device,
    torch.Tensor.is_contiguous,
    torch.Tensor.__len__,
    torch.Tensor.__hash__,
    torch.Tensor.__repr__,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
_ATTRIBUTES = {
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "is_leaf", "is_cuda", "is_cpu", "is_meta",
    "is_mps", "is_xla", "is_xpu", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "itemsize", "nbytes", "grad",
    "retains_grad", "output_nr", "_backward_hooks", "_version", "names", "_base",
}  # fmt: skip
