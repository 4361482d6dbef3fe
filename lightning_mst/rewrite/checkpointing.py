"""Activation checkpointing, layer by layer, always non-reentrant."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_mst.rewrite.offloading import Offload
from lightning_mst.rewrite.shadow import (
    form_of,
    forms,
    original_forward,
    original_value,
    shadow,
    shadow_method,
    shadowed,
)


def is_transformers_layer(module: nn.Module) -> bool:
    """Whether transformers' own switch for checkpointing is in the module."""
    layers = sys.modules.get("transformers.modeling_layers")
    return layers is not None and isinstance(module, layers.GradientCheckpointingLayer)


def is_checkpointed_by_itself(layer: nn.Module) -> bool:
    """Whether transformers' switch is on in a layer, apart from what the rewrite did to it."""
    return is_transformers_layer(layer) and bool(original_value(layer, "gradient_checkpointing"))


def is_checkpointed(layer: nn.Module) -> bool:
    """Whether a layer recomputes its activations now, by transformers' switch or by the rewrite."""
    if is_transformers_layer(layer):
        return bool(getattr(layer, "gradient_checkpointing", False))
    return getattr(layer.__dict__.get("forward"), "function", None) is _checkpointed_forward


def why_not_checkpointed(model: nn.Module, layer: nn.Module) -> str | None:
    """Why a layer can't be recomputed, or ``None``: some models of transformers change what they were given."""
    if is_transformers_layer(layer):
        return None
    for module in model.modules():
        if getattr(module, "supports_gradient_checkpointing", True) is False and layer in set(module.modules()):
            return f"transformers can't checkpoint {type(module).__name__}"
    return None


def choose_layers(setting: str | int | Sequence[int], num_layers: int) -> set[int]:
    """The indices that a ``checkpoint_layers`` setting selects.

    Args:
        setting: ``"all"``, ``"none"``, n for every n-th layer (0, n, 2n, ...), or a list of indices.
        num_layers: how many layers there are.

    Returns:
        The selected indices.

    Raises:
        ValueError: for an index that is not a layer, or ``"auto"``, which takes more than the model to know.
    """
    if setting == "auto":
        raise ValueError(
            "checkpoint_layers='auto' depends on the training step. MSTCallback chooses the layers by itself; without "
            "Lightning: apply_mst(model, lightning_mst.memory.settle(config, model))."
        )
    if setting == "all":
        return set(range(num_layers))
    if setting == "none":
        return set()
    if isinstance(setting, int):
        return set(range(0, num_layers, setting))
    beyond = sorted(i for i in setting if isinstance(i, int) and i >= num_layers)
    if beyond:
        raise ValueError(
            f"checkpoint_layers names layer {beyond[0]}, but the model has {num_layers} layers: 0 to {num_layers - 1}."
        )
    return {int(i) for i in setting}


def checkpoint_layer(layer: nn.Module, enable: bool, offload: Offload | None = None) -> None:
    """Switches one decoder layer's checkpointing on or off.

    transformers' layers checkpoint inside their own ``forward``, so theirs is a flag; any other layer's ``forward`` is
    run by ``torch.utils.checkpoint``.

    Args:
        layer: the layer.
        enable: whether to checkpoint it.
        offload: where to keep what the layer keeps, if not on the device; one object for all layers of a model.
    """
    run = offload or partial(checkpoint, use_reentrant=False)
    if is_transformers_layer(layer):
        shadow(layer, "gradient_checkpointing", enable)
        if enable:
            shadow(layer, "_gradient_checkpointing_func", run)
    elif enable:
        shadow_method(layer, _checkpointed_forward, run)


def release_host_memory(model: nn.Module) -> None:
    """Gives back to the system what the checkpointed layers of a model took on the host."""
    found = [module.__dict__.get("_gradient_checkpointing_func") for module in shadowed(model)]
    for offload in {run for run in (*found, *forms(model)) if isinstance(run, Offload)}:
        offload.release()


def switch_models(model: nn.Module, enable: bool) -> None:
    """Tells transformers' models around their layers, as transformers does: some then keep no cache of keys."""
    if not any(is_transformers_layer(module) for module in model.modules()):
        return
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing") and not is_transformers_layer(module):
            shadow(module, "gradient_checkpointing", enable)
            if enable:
                shadow(module, "_gradient_checkpointing_func", partial(checkpoint, use_reentrant=False))


def _checkpointed_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = original_forward(self)
    if not (torch.is_grad_enabled() and self.training):
        return forward(*args, **kwargs)
    return form_of(self)(partial(forward, **kwargs), *args)
