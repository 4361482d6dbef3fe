"""Bytes and seconds of a block's forward and backward pass."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_mst.experiments.fitting import release
from lightning_mst.experiments.one_block import Block
from lightning_mst.experiments.step_time import now
from lightning_mst.memory.known_values import KnownValues
from lightning_mst.memory.tensor_bytes import TensorBytes
from lightning_mst.ops.rehearsal import rehearsal
from lightning_mst.training.out_of_memory import is_out_of_memory

__all__ = ["median_seconds", "peak_bytes", "predicted_bytes"]

# All bytes are those of the block's weights, of its input, and of whatever comes up during the step.


def predicted_bytes(block: Block, hidden: Tensor, labels: Tensor, fake: FakeTensorMode) -> int:
    """The peak of a step on fake tensors.

    Args:
        block: Of a model with fake weights.
        hidden: Fake, of shape (B, S, D).
        labels: Real, of shape (B, S): which ones count decides what is computed.
        fake: The mode of the fake tensors.
    """
    with fake, KnownValues(fake) as values, rehearsal():
        return _tracked_bytes(block, hidden, values.give(labels))


def peak_bytes(block: Block, hidden: Tensor, labels: Tensor) -> int | None:
    """The peak of a real step: that of CUDA's allocator, or on a CPU of the tensors; None if memory runs out."""
    device = hidden.device
    try:
        if device.type != "cuda":
            return _tracked_bytes(block, hidden, labels)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        block.step(hidden, labels)
        there = sum(tensor.nbytes for tensor in (hidden, labels, *block.weights))
        return torch.cuda.max_memory_allocated(device) - before + there
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        release(device)


def median_seconds(
    block: Block, hidden: Tensor, labels: Tensor, contestants: Sequence[int | None], repetitions: int
) -> dict[int | None, float]:
    """The median time of a real step in each form.

    The forms take turns, so that a machine that speeds up or slows down does so for all of them.

    Args:
        block: The block.
        hidden: (B, S, D).
        labels: (B, S).
        contestants: Numbers of mini-sequences; None is the standard form.
        repetitions: How often each is timed.
    """
    seconds: dict[int | None, list[float]] = {num_chunks: [] for num_chunks in contestants}
    for _ in range(repetitions):
        for num_chunks in contestants:
            block.set_chunks(num_chunks)
            if hidden.is_cuda:
                # The allocator's cache holds what suited another form: what it takes to change that is no part.
                release(hidden.device)
                block.step(hidden, labels)
            start = now(hidden.device)
            block.step(hidden, labels)
            seconds[num_chunks].append(now(hidden.device) - start)
    return {num_chunks: statistics.median(values) for num_chunks, values in seconds.items()}


def _tracked_bytes(block: Block, hidden: Tensor, labels: Tensor) -> int:
    held = TensorBytes()
    with held:
        held.count(block.weights, "weights")
        held.count((hidden, labels), "activations")
        block.step(hidden, labels)
    held.freeze()
    return held.peak
