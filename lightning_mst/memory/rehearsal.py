"""One training step on fake tensors: the real model and the real rewrite, without memory or arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Adafactor, Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from lightning_mst.in_backward.optimizer import OptimizerInBackward
from lightning_mst.memory.attention import FlashAttention
from lightning_mst.memory.distributed import (
    attach,
    check_strategy,
    data_parallel,
    fake_group,
    is_offloaded,
    is_sharded,
    shard,
)
from lightning_mst.memory.grouped_matmul import GroupedMatmul
from lightning_mst.memory.known_values import KnownValues, is_integer
from lightning_mst.memory.optimizers import tensors_on_host
from lightning_mst.memory.places import Places, blocks_of
from lightning_mst.memory.quantized import give_quantization, with_scales
from lightning_mst.memory.tensor_bytes import Kind, TensorBytes
from lightning_mst.on_host.deepspeed import RehearsedCPUAdam
from lightning_mst.on_host.engine import without_accelerator
from lightning_mst.on_host.optimizer import OptimizerOnHost
from lightning_mst.ops.rehearsal import rehearsal


@dataclass(frozen=True)
class Step:
    """A training step, in Lightning's order: forward, zero_grad, backward, optimizer.

    Attributes:
        batch: what the model is given: real tensors, whose integers keep their values.
        compute_loss: from the model and the batch to the loss.
        make_optimizer: from the model to its optimizer, or ``None`` for a step without one.
        autocast: the dtype of mixed precision, or ``None``.
        accumulates: whether it is the last of several batches whose gradients are added up.
        on_gpu: whether to count what only GPUs' kernels and optimizers take.
        strategy: one of ``distributed.STRATEGIES``.
        num_devices: over how many devices; each has a batch like this one.
        gradient_as_bucket_view: of ``"ddp"``. torch's and Lightning's default is ``False``, ours ``True``.
    """

    batch: Any
    compute_loss: Callable[[nn.Module, Any], Tensor]
    make_optimizer: Callable[[nn.Module], Optimizer | None]
    autocast: torch.dtype | None = None
    accumulates: bool = False
    on_gpu: bool = True
    strategy: str = "single"
    num_devices: int = 1
    gradient_as_bucket_view: bool = True

    def __post_init__(self) -> None:
        """Checks the strategy."""
        check_strategy(self.strategy, self.num_devices)


def new_fake_mode() -> FakeTensorMode:
    """A mode for models without memory; tensors that a model keeps beside its parameters may be real."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_copy(module: nn.Module, fake: FakeTensorMode, shared: Iterable[Any] = ()) -> nn.Module:
    """A copy of a module whose parameters and buffers are fake, on the CPU.

    Args:
        module: whole, that is, not sharded.
        fake: the mode of the new tensors.
        shared: objects that the copy refers to as the module does, instead of to copies.
    """
    memo: dict[int, Any] = {id(thing): thing for thing in shared}

    def twin_of(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    with fake:
        for tensor in (*module.parameters(), *module.buffers()):
            twin = twin_of(tensor)
            if isinstance(tensor, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
            give_quantization(twin, tensor, twin_of)
            memo[id(tensor)] = twin
    return copy.deepcopy(module, memo)


def rehearse(
    model: nn.Module, step: Step, fake: FakeTensorMode, *, vocab_size: int | None = None, record: bool = False
) -> TensorBytes:
    """Runs a step as it is once the optimizer has its states, and follows the memory of its tensors.

    Args:
        model: with fake weights, in train mode and in the form to be measured.
        step: the step.
        fake: the mode of the weights.
        vocab_size: V, to tell logits from other activations.
        record: keep every change.

    Returns:
        What was alive where.
    """
    with ExitStack() as stack:
        if step.strategy != "single":
            stack.enter_context(fake_group(step.num_devices))
        if is_sharded(step.strategy):
            model = fake_copy(model, fake)
            blocks = blocks_of(model)
            shard(model, fake, step.strategy, step.num_devices, step.autocast)
        else:
            blocks = blocks_of(model)
        places = Places(blocks)
        held = TensorBytes(places=places, vocab_size=vocab_size, record=record)
        trained = [p for p in model.parameters() if p.requires_grad]
        stack.enter_context(fake)
        values = stack.enter_context(KnownValues(fake))
        if any(parameter.dim() == 3 for parameter in model.parameters()):  # stacked experts
            stack.enter_context(GroupedMatmul())
        stack.enter_context(rehearsal())
        stack.enter_context(without_accelerator())
        stack.enter_context(FlashAttention(kernel_workspace=step.on_gpu).used_by(model))
        # Before its bytes are followed: the values stay outside of the step.
        batch = fake_batch(step.batch, fake, values)
        stack.enter_context(places.followed())
        stack.enter_context(held)
        offloaded = is_offloaded(step.strategy)
        held.count(with_scales(model.parameters()), "host" if offloaded else "weights")
        held.count(model.buffers(), "buffers")
        stack.enter_context(_gradients_marked(trained, held, "host" if offloaded else "gradients"))
        run = partial(step.compute_loss, model)
        if step.strategy == "ddp":
            with held.counting("gradients"):
                run = ddp = stack.enter_context(
                    data_parallel(model, step.compute_loss, gradient_as_bucket_view=step.gradient_as_bucket_view)
                )
        optimizer = step.make_optimizer(model)
        if isinstance(optimizer, RehearsedCPUAdam) and not offloaded:
            raise ValueError(
                "DeepSpeed's CPU Adam steps what DeepSpeed keeps in the host's memory, got"
                f" strategy={step.strategy!r}. Set strategy='zero3_offload', or another optimizer; on one device,"
                " 'adamw_cpu_offload'."
            )
        if isinstance(optimizer, (OptimizerInBackward, OptimizerOnHost)):
            stack.callback(optimizer.remove)
        if step.strategy == "ddp":
            attach(optimizer, ddp)
        if optimizer is not None:
            _give_states(optimizer, trained, held, places, step)
        if step.strategy == "ddp" and step.gradient_as_bucket_view:
            for parameter in trained:  # theirs live in the buckets
                parameter.grad = None
        held.count((t for t in tree_leaves(batch) if isinstance(t, Tensor)), "buffers")
        held.forget_peaks()

        places.phase = "forward"
        with autocast_of(step.autocast):
            loss = run(batch)
        if not step.accumulates:
            for parameter in trained:
                parameter.grad = None
        places.phase = "backward"
        loss.backward()
        del loss
        places.phase = "optimizer"
        if optimizer is not None:
            # What it needs in between is where it runs.
            with held.counting("host") if isinstance(optimizer, OptimizerOnHost) else nullcontext():
                optimizer.step()
        held.freeze()
        for parameter in trained:
            parameter.grad = None
    return held


@contextmanager
def _gradients_marked(trained: list[nn.Parameter], held: TensorBytes, kind: Kind) -> Iterator[None]:
    def mark(parameter: Tensor) -> None:
        if parameter.grad is not None:
            held.count([parameter.grad], kind)

    # Before those of an optimizer that steps in the backward pass.
    hooks = [parameter.register_post_accumulate_grad_hook(mark) for parameter in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _give_states(
    optimizer: Optimizer, trained: list[nn.Parameter], held: TensorBytes, places: Places, step: Step
) -> None:
    """Takes a first step, which leaves the optimizer's states and, as in Lightning, the gradients."""
    inner = getattr(optimizer, "wrapped", optimizer)
    if step.on_gpu and not isinstance(optimizer, OptimizerOnHost):
        for group in optimizer.param_groups:
            # What torch chooses by itself on a GPU, but for Adafactor.
            if group.get("foreach", True) is None and not group.get("fused") and not isinstance(inner, Adafactor):
                group["foreach"] = True
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
        held.count([parameter.grad], "host" if is_offloaded(step.strategy) else "gradients")
    places.phase = "optimizer"
    optimizer.step()
    held.count((t for state in optimizer.state.values() for t in tree_leaves(state) if isinstance(t, Tensor)),
               "host" if is_offloaded(step.strategy) else "optimizer_states")  # fmt: skip
    if step.on_gpu or isinstance(optimizer, OptimizerOnHost):
        held.count(tensors_on_host(optimizer), "host")
    if isinstance(optimizer, OptimizerInBackward):
        optimizer.zero_grad()


def autocast_of(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """As the installed Lightning enters it: from some release on it keeps no copies of the weights until the end."""
    if dtype is None:
        return nullcontext()
    from lightning.pytorch.plugins.precision import MixedPrecision

    return MixedPrecision("16-mixed" if dtype == torch.float16 else "bf16-mixed", "cpu").forward_context()


def fake_batch(batch: Any, fake: FakeTensorMode, values: KnownValues) -> Any:
    """A batch whose integers keep their values, and whose other tensors have none."""

    def twin(entry: Any) -> Any:
        if not isinstance(entry, Tensor):
            return entry
        return values.give(entry) if is_integer(entry) else fake.from_tensor(entry)

    return tree_map(twin, batch)


__all__ = ["Step", "autocast_of", "fake_batch", "fake_copy", "new_fake_mode", "rehearse"]
