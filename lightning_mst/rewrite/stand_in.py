"""A copy of a module to try things on where the module itself can't be run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_mst.rewrite.fsdp1 import is_fsdp1_unit
from lightning_mst.rewrite.shapes import linear_shape, true_shape
from lightning_mst.rewrite.tensor_parallel import is_distributed


def is_out_of_reach(module: nn.Module) -> bool:
    """Whether a module's weights hold no values here: on the meta device, fake, or sharded over ranks."""
    return any(p.is_meta or isinstance(p, FakeTensor) or is_sharded(p) for p in module.parameters())


def is_sharded(tensor: Tensor) -> bool:
    """Whether a rank holds a part of a tensor only."""
    return torch.distributed.is_available() and (is_distributed(tensor) or tensor.numel() == 0)


def stand_in(module: nn.Module, device: str = "cpu") -> nn.Module:
    """Copies a module with random fp32 weights in place of its own, without its hooks.

    A weight's rows share one random row, so the copy takes next to no memory, however large the module is.

    Args:
        module: the module; its weights must be floating-point numbers for a copy on the CPU.
        device: ``"cpu"``, or ``"meta"`` for a copy that has no values at all, in the dtypes of the module.
    """
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        shape = true_shape(parameter)
        if device == "meta":
            values = torch.empty(shape, dtype=parameter.dtype, device=device)
        else:
            # A matrix's rows have the length 1; a vector's entries are of that size, as a norm's are.
            scale = 1.0 if len(shape) < 2 else shape[-1] ** -0.5
            values = (torch.randn(shape[-1:], generator=generator) * scale).expand(shape)
        memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
    for part in module.modules():
        for name, value in vars(part).items():
            # Hooks, and what FSDP2 keeps for its own, hold process groups and the like.
            if name.endswith("_hooks") or name.startswith("__composable_api"):
                memo[id(value)] = type(value)()
            elif isinstance(value, Tensor) and value.grad_fn is not None:
                # A state that a layer keeps from its last call, with a graph that can't be copied.
                memo[id(value)] = torch.zeros(value.shape, dtype=value.dtype, device=device)
        if device == "cpu" and _is_quantized(part):
            memo[id(part)] = _plain_linear(part, generator)
    with _in_own_class(module):
        twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        config = getattr(part, "config", None)
        if config is not None and hasattr(config, "_experts_implementation"):
            # Grouped kernels don't take weights whose rows are shared.
            config._experts_implementation = "eager"
    return twin


def _is_quantized(part: nn.Module) -> bool:
    weight = part._parameters.get("weight")
    return linear_shape(part) is not None and weight is not None and not weight.is_floating_point()


def _plain_linear(layer: nn.Module, generator: torch.Generator) -> nn.Module:
    """What a quantized layer is to a probe: a linear one of its size."""
    shape = linear_shape(layer)
    assert shape is not None
    width, out = shape
    twin = nn.Linear(width, out, bias=False, device="meta")
    row = torch.randn(width, generator=generator) * width**-0.5
    twin.weight = nn.Parameter(row.expand(out, width), requires_grad=False)
    return twin


@contextmanager
def _in_own_class(module: nn.Module) -> Iterator[None]:
    """Runs the body with the modules in the classes that they had before FSDP2, whose own refuse to be copied."""
    sharded = [(part, type(part)) for part in module.modules() if is_fsdp2_unit(part)]
    for part, sharded_class in sharded:
        part.__class__ = sharded_class.__mro__[getattr(sharded_class, "_orig_cls_mro_index", 2)]
    try:
        yield
    finally:
        for part, sharded_class in sharded:
            part.__class__ = sharded_class


def is_fsdp2_unit(module: nn.Module) -> bool:
    """Whether FSDP2 shards a module's weights as a unit of its own."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def units_inside(module: nn.Module) -> str | None:
    """Why a block can't run in mini-sequences, if FSDP shards parts of it as units of their own."""
    if any(is_fsdp2_unit(part) or is_fsdp1_unit(part) for part in module.modules() if part is not module):
        return "parts of it are FSDP units, gathered for every mini-sequence; shard it as a whole, or its layer"
    return None
