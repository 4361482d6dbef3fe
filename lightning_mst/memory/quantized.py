"""Frozen weights in 8 or 4 bits on fake tensors: shapes by bitsandbytes' own kernels, without its classes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily


def quantize_fake(model: nn.Module, weights: str) -> nn.Module:
    """``lightning_mst.quantization.quantize`` for a model whose weights are fake.

    Args:
        model: with fake weights.
        weights: ``"int8"`` or ``"nf4"``.

    Returns:
        The same model.

    Raises:
        ValueError: as ``quantize``.
    """
    import bitsandbytes as bnb

    from lightning_mst.quantization import quantize

    # Without the mode, so that what bitsandbytes keeps for other models, such as its table of 8-bit numbers, is real.
    # Its classes of parameters can't be made of fake tensors; plain parameters with the same attributes do.
    with unset_fake_temporarily(), patch.multiple(bnb.nn, Params4bit=_nf4_weight, Int8Params=_int8_weight):
        return quantize(model, weights)


def _nf4_weight(weight: Tensor, *, requires_grad: bool, quant_type: str, module: nn.Module) -> nn.Parameter:
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(weight, compress_statistics=True, quant_type=quant_type)
    return _with_attributes(packed, quant_state=state, quant_type=quant_type, compress_statistics=True)


def _int8_weight(weight: Tensor, *, requires_grad: bool, CB: Tensor, SCB: Tensor) -> nn.Parameter:
    return _with_attributes(weight, CB=CB, SCB=SCB)


def _with_attributes(weight: Tensor, **attributes: Any) -> nn.Parameter:
    parameter = nn.Parameter(weight, requires_grad=False)
    for name, value in attributes.items():
        setattr(parameter, name, value)
    return parameter


def with_scales(parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    """The parameters, and the scales that belong to quantized ones."""
    for parameter in parameters:
        yield parameter
        scale = getattr(parameter, "SCB", None)
        if isinstance(scale, Tensor):
            yield scale
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield from (t for t in (state.absmax, state.code, state.offset) if isinstance(t, Tensor))
            state = state.state2


def give_quantization(twin: Tensor, tensor: Tensor, make_fake: Callable[[Tensor], Tensor]) -> None:
    """Gives a fake twin of a quantized weight what bitsandbytes keeps beside it.

    Args:
        twin: of the weight.
        tensor: the weight.
        make_fake: makes a fake twin of a tensor.
    """
    memo: dict[int, Any] = {}
    for part in with_scales([tensor]):
        memo[id(part)] = twin if part is tensor else make_fake(part)
    for name in ("SCB", "quant_state", "quant_type", "compress_statistics"):
        if hasattr(tensor, name):
            setattr(twin, name, copy.deepcopy(getattr(tensor, name), memo))


__all__ = ["give_quantization", "quantize_fake", "with_scales"]
