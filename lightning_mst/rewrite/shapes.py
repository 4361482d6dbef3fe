"""The sizes of weights and layers, whatever they are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def true_shape(parameter: Tensor) -> torch.Size:
    """A parameter's shape as a whole: DeepSpeed's ZeRO-3 leaves an empty tensor where its own are in pieces."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer of any make, or ``None``.

    Quantized linear layers and adapters around a linear layer (LoRA) call their sizes as ``nn.Linear`` does; GPT-2's
    ``Conv1D``, which stores its weight transposed, calls them ``nx`` and ``nf``.
    """
    for names in (("in_features", "out_features"), ("nx", "nf")):
        sizes = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(size, int) for size in sizes):
            return sizes  # type: ignore[return-value]
    return None
