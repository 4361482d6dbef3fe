"""Frozen weights in 8 or 4 bits, by bitsandbytes: what QLoRA trains adapters on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

try:
    import bitsandbytes as bnb
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "Quantized weights need the package bitsandbytes: pip install 'lightning-mst[quantized]'", name=error.name
    ) from error

__all__ = ["Int8Linear", "NF4Linear", "quantize"]


class NF4Linear(bnb.nn.Linear4bit):
    """A frozen linear layer in 4-bit NormalFloat, in blocks of 64 weights whose scales are quantized once more.

    Args:
        linear: The layer to quantize. It computes in the dtype that its weight has.
        device: Where to quantize, and to stay.
    """

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        weight = linear.weight.detach()
        super().__init__(
            linear.in_features, linear.out_features, bias=False, compute_dtype=weight.dtype, quant_type="nf4",
            device="meta",
        )  # fmt: skip
        self.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=self).to(device)
        self.bias = _frozen_bias(linear, device)
        # On CPUs with AVX512-BF16 the first evaluation would turn the weight into a form that has no backward.
        self.support_avx512bf16_for_cpu = False


class Int8Linear(bnb.nn.Linear8bitLt):
    """A frozen linear layer in 8 bits, one scale per output feature; inputs are not quantized.

    bitsandbytes' own forward keeps every layer's input until the backward pass, out of reach of activation
    checkpointing, although the gradient of a frozen layer's input needs the weight alone. This one keeps the weight.

    Args:
        linear: The layer to quantize. It computes in the dtype of its input.
        device: Where to quantize, and to stay.
    """

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, device="meta")
        # bitsandbytes' kernel takes fp16.
        weight, scale, _ = bnb.functional.int8_vectorwise_quant(linear.weight.detach().to(device, torch.float16))
        self.weight = bnb.nn.Int8Params(weight, requires_grad=False, CB=weight, SCB=scale)
        self.bias = _frozen_bias(linear, device)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., in_features)`` to ``(..., out_features)``."""
        if self.weight.SCB.device != x.device:
            self.weight.SCB = self.weight.SCB.to(x.device)  # nn.Module.to moves the weight alone
        y = _Int8Product.apply(x, self.weight, self.weight.SCB)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Int8Product(torch.autograd.Function):
    """``x @ weight.T`` that saves the quantized weight, and dequantizes it once more in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _dequantize(weight, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        weight, scale = ctx.saved_tensors
        return gradient @ _dequantize(weight, scale, gradient.dtype), None, None


def _dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype).mul_(scale.to(dtype).div(127).unsqueeze(1))


def _frozen_bias(linear: nn.Linear, device: torch.device) -> nn.Parameter | None:
    return None if linear.bias is None else nn.Parameter(linear.bias.detach().to(device), requires_grad=False)


_LAYERS: dict[str, type[Int8Linear] | type[NF4Linear]] = {"int8": Int8Linear, "nf4": NF4Linear}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize(model: nn.Module, weights: str, *, device: torch.device | None = None) -> nn.Module:
    """Freeze a model, and replace its linear layers in place by quantized ones; all but the LM head.

    One layer after the other, so that no second copy of the model exists. What a quantized layer loses by rounding is
    lost for good: load the trained weights first, and add what is to be trained (adapters) afterwards.

    Args:
        model: A model with ``nn.Linear`` layers. The head is what its ``get_output_embeddings`` names; it stays as it
            is, like embeddings and norms.
        weights: ``"int8"`` (one scale per output feature) or ``"nf4"`` (4-bit NormalFloat, as in QLoRA).
        device: Where to quantize, and to leave the quantized layers. Default: where each weight is.

    Returns:
        The same model.

    Raises:
        ValueError: ``weights`` is neither of the two, the model has no linear layer, or one in fp64.
    """
    if weights not in _LAYERS:
        raise ValueError(f"weights should be one of {', '.join(_LAYERS)}, got {weights!r}")
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child is not head
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear layer to quantize"
            + (" besides its LM head" if isinstance(head, nn.Linear) else "")
            + ". Train it without quantization."
        )
    wrong = next((child.weight.dtype for _, _, child in found if child.weight.dtype not in _DTYPES), None)
    if wrong is not None:
        raise ValueError(
            f"bitsandbytes quantizes weights in fp32, bf16 or fp16, got {wrong}. Load the model in one of them."
        )
    model.requires_grad_(False)
    for parent, name, child in found:
        setattr(parent, name, _LAYERS[weights](child, device or child.weight.device).train(child.training))
    # What PEFT asks for, to pick the adapter layers that know how to merge into quantized weights.
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = weights == "nf4", weights == "int8"
    return model
