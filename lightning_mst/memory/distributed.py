"""One of N devices, rehearsed in one process: torch's own DDP and FSDP2 on fake tensors, in a pretended group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_mst.in_backward import all_reduce
from lightning_mst.in_backward.optimizer import OptimizerInBackward
from lightning_mst.rewrite.fsdp2 import shard_models

STRATEGIES = {
    "single": "one device",
    "ddp": "DDP whose gradients live in its buckets, as in conf/strategy",
    "fsdp2": "the units of mst_model_parallel; weights, gradients and optimizer states are sharded",
    "zero2": "as fsdp2, but weights that were gathered stay whole until their backward pass",
    "zero3": "as fsdp2",
    "zero3_offload": "as zero3, with weights, gradients and optimizer states in the host's memory",
}
"""By name: what they are modelled as."""


def is_sharded(strategy: str) -> bool:
    """Whether a device holds only a part of each weight."""
    return strategy in ("fsdp2", "zero2", "zero3", "zero3_offload")


def is_offloaded(strategy: str) -> bool:
    """Whether the host keeps the weights, gradients and optimizer states."""
    return strategy == "zero3_offload"


def check_strategy(strategy: str, num_devices: int) -> None:
    """Makes sure that a strategy can be rehearsed.

    Raises:
        ValueError: it is unknown, or does not go with the number of devices.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is not known. Expected one of {', '.join(STRATEGIES)}.")
    if num_devices < 1:
        raise ValueError(f"num_devices={num_devices} should be at least 1.")
    if strategy == "single" and num_devices > 1:
        several = [name for name in STRATEGIES if name != "single"]
        raise ValueError(
            f"strategy='single' is one device, but num_devices={num_devices}. Name a strategy for several:"
            f" {', '.join(several)}."
        )


@contextmanager
def fake_group(num_devices: int) -> Iterator[None]:
    """Lets this process be the first of so many while the body runs; whatever it sends comes back unchanged.

    Raises:
        RuntimeError: the process belongs to a real group already.
    """
    if dist.is_initialized():
        raise RuntimeError(
            "A step of several devices is rehearsed in a process group that only pretends, but this process belongs to"
            f" a real one ({dist.get_backend()}, {dist.get_world_size()} processes). Plan in a process of its own, such"
            " as `lightning-mst plan`, or before training starts."
        )
    # Not public, but what torch's own memory estimates of FSDP use.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_devices)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(
    model: nn.Module, fake: FakeTensorMode, strategy: str, num_devices: int, autocast: torch.dtype | None
) -> None:
    """Shards a fake model in place, as the strategy ``mst_model_parallel`` does."""
    mesh = init_device_mesh("cpu", (num_devices,))
    holder = nn.Module()  # in place of the LightningModule
    holder.model = model
    precision = "bf16-mixed" if autocast == torch.bfloat16 else "true"
    with fake:
        shard_models(holder, mesh, precision, reshard_after_forward=strategy != "zero2")


@contextmanager
def data_parallel(
    model: nn.Module, compute_loss: Callable[[nn.Module, Any], Tensor], *, gradient_as_bucket_view: bool
) -> Iterator[DistributedDataParallel]:
    """A DDP module that computes the loss of a batch, as Lightning wraps a ``training_step``.

    Args:
        model: with fake weights.
        compute_loss: from the model and a batch to the loss.
        gradient_as_bucket_view: as of ``DistributedDataParallel``.
    """

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: Any) -> Tensor:
            return compute_loss(self.model, batch)

    with patch.object(all_reduce, "allreduce_hook", _already_reduced):
        yield DistributedDataParallel(Wrapped(), init_sync=False, gradient_as_bucket_view=gradient_as_bucket_view)


def attach(optimizer: Optimizer | None, model: DistributedDataParallel) -> None:
    """Lets DDP reduce its buckets at once, and an optimizer in the backward pass step behind it."""
    if isinstance(optimizer, OptimizerInBackward):
        optimizer.attach(model)
    else:
        model.register_comm_hook(None, _already_reduced)


# Its annotations have to be types: DDP compares them.
def _already_reduced(state, bucket):  # type: ignore[no-untyped-def]
    """A communication hook; the group's own pretends so well that it answers with nothing."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
