"""Optimizers by name, as ``conf/optimizer`` has them, for a model whose steps are rehearsed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mst.in_backward.optimizer import OptimizerInBackward
from lightning_mst.on_host.deepspeed import deepspeed_cpu_adam
from lightning_mst.on_host.optimizer import OptimizerOnHost

Make = Callable[..., Optimizer]


def _bitsandbytes(name: str, **options: Any) -> Make:
    def make(parameters: Any) -> Optimizer:
        try:
            import bitsandbytes as bnb
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"bitsandbytes' {name} needs the package bitsandbytes: pip install 'lightning-mst[quantized]'",
                name=error.name,
            ) from error
        optimizer: Optimizer = getattr(bnb.optim, name)(parameters, lr=1e-3, **options)
        return optimizer

    return make


OPTIMIZERS: dict[str, tuple[Make, str]] = {
    "adamw": (partial(torch.optim.AdamW, lr=1e-3, fused=True), "torch's, fused; states in the weights' dtype"),
    "adamw_fp32": (_bitsandbytes("AdamW", optim_bits=32), "states in fp32 whatever the weights' dtype"),
    "adamw_8bit": (_bitsandbytes("AdamW8bit"), "a byte for each number of the states, but fp32 for small weights"),
    "paged_adamw_8bit": (_bitsandbytes("PagedAdamW8bit"), "as adamw_8bit, in the host's memory while not in use"),
    "adafactor": (partial(torch.optim.Adafactor, lr=1e-2), "torch's; states of a few rows and columns"),
    "sgd": (partial(torch.optim.SGD, lr=0.1), "torch's without momentum: no states"),
    "adamw_cpu_offload": (
        partial(OptimizerOnHost, lr=1e-3),
        "AdamW in the host's memory: weights, gradients and states",
    ),
    "deepspeed_cpu_adam": (deepspeed_cpu_adam, "DeepSpeed's AdamW in the host's memory, for strategy 'zero3_offload'"),
}
"""By name: what makes it from parameters, and what it is."""

IN_BACKWARD = "_in_backward"
"""At the end of a name: the optimizer steps each weight during the backward pass."""


def make_optimizer(name: str, *, in_backward: bool = False) -> Callable[[nn.Module], Optimizer]:
    """A function that makes the optimizer of a model's trained parameters.

    Args:
        name: one of ``OPTIMIZERS``; ``"adamw_in_backward"`` and the like set ``in_backward``.
        in_backward: step each weight during the backward pass, by ``OptimizerInBackward``.

    Raises:
        ValueError: the name is unknown.
    """
    base = name.removesuffix(IN_BACKWARD)
    if base not in OPTIMIZERS:
        raise ValueError(
            f"optimizer={name!r} is not known. Expected one of {', '.join(OPTIMIZERS)}, or one of these with"
            f" {IN_BACKWARD!r} behind it, such as 'adamw{IN_BACKWARD}'."
        )
    make, _ = OPTIMIZERS[base]

    def make_for(model: nn.Module) -> Optimizer:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return OptimizerInBackward(trained, make) if in_backward or base != name else make(trained)

    return make_for


def tensors_on_host(optimizer: Optimizer) -> list[Tensor]:
    """The tensors that an optimizer keeps in the host's memory where it trains a GPU's weights.

    One on the host keeps there copies of the weights, the gradients and the states; pinned memory counts without what
    torch rounds it up by. A paged one of bitsandbytes keeps its states there, and moves what it needs, and back when
    the GPU is short of memory; small ones stay on the GPU.
    """
    if isinstance(optimizer, OptimizerOnHost):
        return optimizer.host_tensors
    paged = getattr(optimizer, "wrapped", optimizer)
    if not getattr(paged, "is_paged", False):
        return []
    states = [state[key] for state in paged.state.values() for key in ("state1", "state2") if key in state]
    return [state for state in states if state.numel() >= 1e5]
