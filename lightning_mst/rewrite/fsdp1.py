"""FSDP1, whose units are modules around the model's own and whose weights are views of one flat parameter."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import Tensor, nn

from lightning_mst.rewrite.shadow import BoundMethod


def is_fsdp1_unit(module: nn.Module) -> bool:
    """Whether a module is FSDP1's wrapper around a unit."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not part of every build of torch
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def _is_fsdp1_view(value: object) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(value, Tensor) and isinstance(value._base, fsdp.FlatParameter)


def weights_of(block: nn.Module) -> Iterator[Tensor]:
    """The parameters of a block and what FSDP1 has put in their place; some of them twice.

    Its views stand among a module's parameters in the forward pass, but while checkpointing recomputes a layer they are
    plain attributes, which ``parameters()`` does not list.
    """
    for part in block.modules():
        yield from part.parameters(recurse=False)
        yield from (value for value in vars(part).values() if _is_fsdp1_view(value))


def keep_work_in_units(model: nn.Module) -> None:
    """Lets an MLP or a projection that is a unit of its own do all its work while it has its weights.

    Otherwise the norm after an MLP, which is not in the unit, would ask for the MLP's output when they are gone. To be
    called after FSDP1 has wrapped a rewritten model. The change stays when the handle is removed, and does nothing to
    the unmodified model.

    Args:
        model: the wrapped model.
    """
    for unit in filter(is_fsdp1_unit, model.modules()):
        if isinstance(vars(unit.module).get("forward"), BoundMethod):
            # A block that has a hook does its work inside, for the sake of those that gather weights in hooks.
            unit.module.register_forward_pre_hook(_is_a_unit)


def _is_a_unit(module: nn.Module, args: object) -> None:
    """Nothing to do: that the hook is there is what counts."""
