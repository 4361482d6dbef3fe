"""Checkpoints of a model with a frozen base: what was trained is in them, and how to recognise the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["check_same_base", "describe_frozen", "has_frozen_base", "without_frozen"]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def has_frozen_base(model: nn.Module) -> bool:
    """Whether a model has PEFT adapters or quantized weights."""
    return hasattr(model, "peft_config") or not all(p.is_floating_point() for p in model.parameters())


def without_frozen(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The entries of trainable parameters and of buffers: no frozen weights, nor their quantization constants.

    Args:
        state_dict: Of ``model``.
        model: The model.
    """
    kept = _kept_names(model)
    return {name: value for name, value in state_dict.items() if name in kept}


def describe_frozen(model: nn.Module) -> dict[str, list[Any]]:
    """Name -> shape, dtype and a sum over the bits of each frozen parameter.

    Quantized parameters are described by shape and dtype alone: their last bits depend on the device that rounded.
    """
    return {name: _describe(p) for name, p in model.named_parameters() if not p.requires_grad}


def _describe(parameter: Tensor) -> list[Any]:
    description: list[Any] = [list(parameter.shape), str(parameter.dtype).removeprefix("torch."), None]
    if parameter.is_floating_point() and not is_traceable_wrapper_subclass(parameter):
        bits = parameter.detach().contiguous().view(_BITS[parameter.element_size()])
        description[2] = int(bits.sum(dtype=torch.int64))
    return description


def check_same_base(checkpoint: Mapping[str, Any], model: nn.Module) -> None:
    """Make sure that the trained weights of a checkpoint belong to the model and to its frozen weights.

    Args:
        checkpoint: With ``"state_dict"`` and ``"frozen_weights"`` (of :func:`describe_frozen`).
        model: The model that is to take them over.

    Raises:
        ValueError: The model trains other weights, or its frozen weights are not those that the checkpoint was made
            with.
    """
    advice = (
        "Build the model as in the run that wrote it: the same model, seed or trained weights, dtype, quantization and"
        " adapter."
    )
    saved, expected = set(checkpoint["state_dict"]), _kept_names(model) & set(model.state_dict())
    if saved != expected:
        example = min(saved ^ expected)
        side = "only the checkpoint" if example in saved else "only the model"
        raise ValueError(
            f"The checkpoint holds {len(saved)} trained weights, this model has {len(expected)}; {side} has {example}."
            f" {advice}"
        )
    before, now = checkpoint.get("frozen_weights"), describe_frozen(model)
    if before is None:
        raise ValueError(f"The checkpoint is of a model without frozen weights, this model has {len(now)}. {advice}")
    for name in [*before, *now]:
        if before.get(name) != now.get(name):
            raise ValueError(
                f"The checkpoint was made with other frozen weights: {name} was {_words(before.get(name))}, here it is"
                f" {_words(now.get(name))}. {advice}"
            )


def _kept_names(model: nn.Module) -> set[str]:
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    return trained | {name for name, _ in model.named_buffers()}


def _words(description: list[Any] | None) -> str:
    if description is None:
        return "missing"
    shape, dtype, bits = description
    return f"{dtype} of shape {tuple(shape)}" + ("" if bits is None else f" with the bit sum {bits}")
