"""FSDP1, whose units are modules around the model's own and whose weights are views of one flat parameter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mst.rewrite.shadow import BoundMethod


def is_fsdp1_unit(module: nn.Module) -> bool:
    """Whether a module is FSDP1's wrapper around a unit."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not part of every build of torch
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def _is_fsdp1_view(value: object) -> bool:
    if not isinstance(value, Tensor):  # so are nearly all: asked of everything in a block, at each of its calls
        return False
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(value._base, fsdp.FlatParameter)


def weights_of(block: nn.Module) -> Iterator[Tensor]:
    """The parameters of a block and what FSDP1 has put in their place; some of them twice.

    Its views stand among a module's parameters in the forward pass, but while checkpointing recomputes a layer they are
    plain attributes, which ``parameters()`` does not list.
    """
    for part in block.modules():
        yield from part.parameters(recurse=False)
        yield from (value for value in vars(part).values() if _is_fsdp1_view(value))


@dataclass
class FirstViews:
    """The views of a unit's weights that its first forward pass of a step had, for its later ones.

    In mixed precision every forward pass of a unit has views with a graph of their own, and FSDP1 reduces the gradients
    when the first one's are there. With its views in all of them, all gradients are there by then. (FSDP1 does the same
    for reentrant checkpointing; the views' memory is filled anew by every gathering.)
    """

    _step: object = None
    _views: dict[tuple[nn.Module, str], Tensor] = field(default_factory=dict)

    def use_in(self, block: nn.Module) -> None:
        """Puts the first forward's views in the place of the present ones; to be called in the unit's forward.

        Args:
            block: the module that is the unit.
        """
        if not torch.is_grad_enabled():
            return
        views = {
            (part, name): value
            for part in block.modules()
            for entries in _entries(part)
            for name, value in entries.items()
            if _is_fsdp1_view(value) and value.requires_grad
        }
        if not views:
            return
        # Private, and nothing public tells: set by the first forward and taken away at the end of the backward pass.
        step = next(iter(views.values()))._base._post_backward_hook_state
        if step is not self._step:
            self._step, self._views = step, views
        for part, name in views:
            for entries in _entries(part):
                if name in entries:
                    entries[name] = self._views[part, name]


def _entries(part: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where a module's own weights may stand."""
    return part._parameters, vars(part)


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
