"""DeepSpeed's Adam for weights that it keeps in the host's memory, and what it takes there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

__all__ = ["RehearsedCPUAdam", "deepspeed_cpu_adam"]


def deepspeed_cpu_adam(params: Iterable[Any], **options: Any) -> Optimizer:
    """Makes DeepSpeed's ``DeepSpeedCPUAdam``, the optimizer of ZeRO with optimizer states in the host's memory.

    For ``strategy="mst_deepspeed_stage_3_offload"``, or Lightning's DeepSpeed strategy with ``offload_optimizer=True``.
    DeepSpeed compiles its kernel when it is first used, for a minute, and keeps it.

    Args:
        params: parameters or parameter groups. For some without values, which are rehearsed, what it makes computes
            nothing and takes the memory that DeepSpeed would.
        **options: of ``DeepSpeedCPUAdam``, such as ``lr``, ``betas``, ``weight_decay`` and ``adamw_mode``.

    Raises:
        ModuleNotFoundError: deepspeed is not installed.
        ValueError: its kernel can't be compiled.
    """
    params = list(params)
    listed = [parameter for each in params for parameter in (each["params"] if isinstance(each, dict) else [each])]
    if any(isinstance(_local(parameter), FakeTensor) for parameter in listed):
        return RehearsedCPUAdam(params, lr=options.get("lr", 1e-3))
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "DeepSpeed's CPU Adam needs the package deepspeed: pip install 'lightning-mst[deepspeed]'", name=error.name
        ) from error
    try:
        optimizer: Optimizer = DeepSpeedCPUAdam(params, **options)
    except RuntimeError as error:
        raise ValueError(
            "DeepSpeed compiles its CPU Adam when it is first used, which failed:"
            f" {error.__cause__ or error}\nIt takes a C++ compiler (g++) and ninja (pip install ninja); `ds_report`"
            " shows what is missing. Or keep the states on the device: strategy=mst_deepspeed_stage_3 optimizer=adamw."
        ) from error
    return optimizer


class RehearsedCPUAdam(Optimizer):
    """What ZeRO-3 keeps on the host beside the weights and their gradients, with an Adam that computes nothing.

    For each number of a weight's part on this device: the weight in fp32, its gradient in fp32, and two states in
    fp32, 16 bytes in all.

    Args:
        params: parameters without values.
        lr: a learning rate, for schedulers.
    """

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes the states, once."""
        result = None if closure is None else closure()
        for parameter in (p for group in self.param_groups for p in group["params"] if p.requires_grad):
            if parameter not in self.state:
                names = ("weight", "gradient", "exp_avg", "exp_avg_sq")
                part = _local(parameter)
                self.state[parameter] = {name: torch.zeros_like(part, dtype=torch.float32) for name in names}
        return result


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
