"""FSDP1: weights that are views of one flat parameter, and heads that are units of their own.

FSDP1 replaces a module's weights by views of its unit's flat parameter while the unit runs. In the forward pass they
stand among the module's parameters, but while checkpointing recomputes a layer they are plain attributes, which
``parameters()`` does not list. And its units are modules around the model's own, gathered only when these are called.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter


def weights_of(module: nn.Module) -> Iterator[Tensor]:
    """The module's parameters and what FSDP1 has put in their place; some of them twice."""
    for part in module.modules():
        yield from part.parameters(recurse=False)
        for value in vars(part).values():
            if isinstance(value, Tensor) and isinstance(value._base, FlatParameter):
                yield value
