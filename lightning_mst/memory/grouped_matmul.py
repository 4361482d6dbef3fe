"""Matmuls of experts on fake tensors: their size follows from the number of tokens, whoever of them goes where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class GroupedMatmul(TorchDispatchMode):
    """Lets ``grouped_mm`` take every dtype that its kernels take; torch's rule for fake tensors knows bf16 alone."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs the operator, of other dtypes in bf16."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            first, second, *rest = args
            return func(first.bfloat16(), second.bfloat16(), *rest, **kwargs).to(first.dtype)
        return func(*args, **kwargs)
