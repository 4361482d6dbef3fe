"""The tensors of one real training step, by kind and place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_mst.memory.places import Places
from lightning_mst.memory.prediction import vocab_size_of
from lightning_mst.memory.quantized import with_scales
from lightning_mst.memory.tensor_bytes import TensorBytes


@contextmanager
def tensors_of_step(
    model: nn.Module, optimizers: Iterable[Optimizer], batch: Any, places: Places, *, record: bool = False
) -> Iterator[TensorBytes]:
    """Follows every tensor of the step that runs in the body.

    Weights, buffers, the batch, gradients and optimizer states that exist already count from the start.

    Args:
        model: the model, whole or sharded.
        optimizers: its optimizers.
        batch: tensors in any collection.
        places: tells where the step is.
        record: keep every change.

    Yields:
        What is alive where; it stays as it is after the body.
    """
    held = TensorBytes(places=places, vocab_size=vocab_size_of(model), record=record)
    held.count(with_scales(model.parameters()), "weights")
    held.count(model.buffers(), "buffers")
    held.count(_tensors_in(batch), "buffers")
    held.count((p.grad for p in model.parameters() if p.grad is not None), "gradients")
    for optimizer in optimizers:
        states = getattr(optimizer, "state", {})  # a wrapper, such as DeepSpeed's, may have none
        held.count(_tensors_in(list(states.values())), "optimizer_states")
    held.forget_peaks()

    def mark(parameter: Tensor) -> None:
        if parameter.grad is not None:
            held.count([parameter.grad], "gradients")

    hooks = [p.register_post_accumulate_grad_hook(mark) for p in model.parameters() if p.requires_grad and p.is_leaf]
    try:
        with held:
            yield held
    finally:
        for hook in hooks:
            hook.remove()
        held.freeze()


def _tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
