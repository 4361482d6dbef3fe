"""Losses that count every token alike, whichever rank and micro-batch it is in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mst.training.ranks import mean_of_ranks
from lightning_mst.training.wrapping import wrapped

__all__ = ["TokenWeights", "count_labels"]

IGNORE_INDEX = -100


def count_labels(batch: Any) -> Tensor:
    """The number of tokens in the mean of a causal language model's loss.

    Args:
        batch: a mapping with ``"labels"`` (B, S), not shifted: the first of a row has no token before it.

    Returns:
        (), int64.

    Raises:
        MisconfigurationException: the batch has no labels.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        got = f"the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
        raise MisconfigurationException(
            f"token_weighted=True counts the tokens in batch['labels'], but the batch has {got}. Give a function"
            " instead: token_weighted=lambda batch: (the number of tokens that the loss is the mean of)."
        )
    return (labels[..., 1:] != IGNORE_INDEX).sum()


class TokenWeights(Callback):
    """Makes an optimizer step that of one batch which holds the tokens of all ranks and micro-batches.

    Lightning averages the mean losses of ranks and accumulated micro-batches, so that a token in a short one counts
    more. Here a mean over n of the step's N tokens has the weight n / N in the backward pass. What a training step
    returns and logs stays as it is.

    1. At the first micro-batch of a step the ranks add up its tokens. Their mean per rank is the unit of weight: with
       one micro-batch to a step, all is done with that.
    2. With several, N is known only at the end: the gradients are then scaled, before they are clipped.

    Args:
        count: batch -> the number of tokens of which its loss is the mean.

    Attributes:
        weight: of the present micro-batch's loss, (), float64.
    """

    def __init__(self, count: Callable[[Any], Tensor | int] = count_labels) -> None:
        self._count = count
        self.weight: Tensor | None = None
        self._unit: Tensor | None = None
        self._tokens: Tensor | None = None
        self._undo: ExitStack | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "token_weighted=True needs automatic optimization: with manual optimization only your training_step"
                " knows which losses make up a step. Weight them there."
            )
        if isinstance(trainer.strategy, DeepSpeedStrategy) and trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                f"token_weighted=True with accumulate_grad_batches={trainer.accumulate_grad_batches} scales gradients"
                " before the step, which DeepSpeed keeps to itself. Set accumulate_grad_batches=1 and a larger batch,"
                " or use another strategy."
            )
        self._undo = ExitStack()
        self._undo.enter_context(wrapped(trainer.strategy, "backward", self._backward))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        tokens = torch.as_tensor(self._count(batch), dtype=torch.float64, device=trainer.strategy.root_device)
        if batch_idx % trainer.accumulate_grad_batches == 0 or self._unit is None:
            self._unit = mean_of_ranks(tokens).clamp_min(1)
            self._tokens = torch.zeros_like(tokens)
        assert self._tokens is not None
        self.weight = tokens / self._unit
        self._tokens += tokens

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if trainer.accumulate_grad_batches == 1:
            return
        assert self._unit is not None
        assert self._tokens is not None
        # Lightning divided each loss by the number of micro-batches.
        scale = trainer.accumulate_grad_batches * self._unit / mean_of_ranks(self._tokens).clamp_min(1)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale.item())

    def _backward(self, backward: Callable[..., Tensor], loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self.weight is not None
        weight = self.weight.to(torch.promote_types(loss.dtype, torch.float32))
        return backward(loss * weight, *args, **kwargs)

    def _end(self) -> None:
        if self._undo is not None:
            self._undo.close()
        self._undo = self._unit = None
