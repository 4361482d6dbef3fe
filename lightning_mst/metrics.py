"""Perplexity from a loss that was already computed, without logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn


class Perplexity(Metric):
    """Perplexity ``exp(total cross-entropy / number of tokens)`` from summed losses.

    ``torchmetrics.text.Perplexity`` takes logits ``[bsz, seq_len, vocab_size]``, the tensor that a mini-sequence
    head never forms. This metric takes the two numbers that such a head returns and gives the same value, for
    O(1) memory instead of O(bsz * seq_len * vocab_size). It weights every token equally, whatever the number of
    ignored labels in its batch, which the mean of the batches' perplexities or losses does not.

    The sum is float64 and the count int64: in float32 a long validation run stops counting single tokens at 2**24.
    Both add up over processes (``dist_reduce_fx="sum"``). Casts of the module that holds the metric (``.half()``,
    ``.to(torch.bfloat16)``, Lightning's ``precision="bf16-true"``) move the states but leave their dtypes alone;
    only ``set_dtype`` changes them.

    Args:
        **kwargs: Options of ``torchmetrics.Metric``.

    Example:
        >>> metric = Perplexity()
        >>> metric.update(loss_sum=6.0, num_tokens=2)
        >>> metric.update(loss_sum=2.0, num_tokens=2)
        >>> round(metric.compute().item(), 4)  # exp(8 / 4)
        7.3891
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    loss_sum: Tensor
    num_tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("loss_sum", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss_sum: Tensor | float, num_tokens: Tensor | int) -> None:
        """Add one batch.

        Args:
            loss_sum: Cross-entropy summed over the live tokens, in nats; 0-d, any floating dtype.
            num_tokens: How many tokens that sum covers (labels that are not ignored); 0-d or a number.

        Raises:
            ValueError: An argument has more than one element, such as unreduced per-token losses.
        """
        self.loss_sum = self.loss_sum + _scalar(loss_sum, name="loss_sum", like=self.loss_sum)
        self.num_tokens = self.num_tokens + _scalar(num_tokens, name="num_tokens", like=self.num_tokens)

    def compute(self) -> Tensor:
        """Return the perplexity of everything seen since the last reset.

        Returns:
            0-d float64 tensor; ``nan``, with a warning, when no live token was seen.
        """
        if self.num_tokens == 0:
            rank_zero_warn(
                "Perplexity.compute() was called before any live token was seen, so it returns nan. "
                "Check that the validation set is not empty and that not all its labels are ignored."
            )
        return torch.exp(self.loss_sum / self.num_tokens)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Perplexity:
        # torchmetrics shields its states from `.half()` and the like, but not from `.to(dtype)`, which is what
        # Lightning's true half precision calls: a bfloat16 sum would stop growing after a few hundred batches.
        if self._dtype_convert:
            return super()._apply(fn, exclude_state)

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, exclude_state)


def _scalar(value: Tensor | float, *, name: str, like: Tensor) -> Tensor:
    # The dtype is named at once: a Python float would pass through float32.
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if tensor.numel() != 1:
        raise ValueError(
            f"`{name}` must be a single number (the sum over the batch), got a tensor of shape {list(tensor.shape)}. "
            "Sum it over the live tokens first."
        )
    return tensor.detach().reshape(())
