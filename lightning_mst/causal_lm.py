"""A LightningModule that trains any causal language model which computes its own loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mst.frozen_base import check_same_base, describe_frozen, has_frozen_base, without_frozen
from lightning_mst.metrics import Perplexity
from lightning_mst.models import loss_of, takes_use_cache
from lightning_mst.training.optimizers import connect_optimizers
from lightning_mst.training.random_states import random_states, random_states_of_all_processes, set_random_states
from lightning_mst.training.token_weights import TokenWeights

__all__ = ["CausalLM"]

IGNORE_INDEX = -100


class CausalLM(pl.LightningModule):
    """Trains ``model(input_ids=..., labels=...)``, whose loss is the mean cross-entropy of the next token.

    A batch is a mapping with ``input_ids`` and ``labels``, both int64 of shape ``(B, S)``. The labels are not shifted
    (``labels[b, s]`` belongs to ``input_ids[b, s]``; the model shifts them, as transformers does), and ``-100`` marks
    a token that does not count.

    Logs ``train_loss`` (of this process's batch) at each step, and over each validation ``val_loss`` (mean over all
    counted tokens, nats) and ``val_perplexity``. None needs logits, so all stay small with a mini-sequence LM head.

    With PEFT adapters or quantized weights, checkpoints hold what is trained, and of the frozen weights a description
    by which a resuming run recognises them: they come from where the model comes from.

    Args:
        model: A causal language model of transformers, or any module that answers ``input_ids`` and ``labels`` with
            its loss: the loss itself, a tuple that begins with it, a mapping with ``"loss"``, or an object with
            ``.loss``.
        optimizer: Parameters -> optimizer. Default: ``torch.optim.AdamW`` with a learning rate of 1e-3.
        scheduler: Optimizer -> learning rate scheduler, stepped after each optimizer step. Default: none.
        token_weighted: Let every token count alike in a step over several ranks and accumulated batches, also where
            they have different numbers of labels; see :class:`~lightning_mst.training.token_weights.TokenWeights`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], Any] | None = None,
        token_weighted: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.token_weighted = token_weighted
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.perplexity = Perplexity()
        self._states_to_restore: list[dict[str, Any]] | None = None
        # A cache of keys and values is of no use in training, and keeps every layer's alive.
        self._forward_options = {"use_cache": False} if takes_use_cache(model) else {}

    @override
    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over the counted tokens, of shape ``()``; ``input_ids`` and ``labels`` are ``(B, S)``."""
        return loss_of(self.model(input_ids=input_ids, labels=labels, **self._forward_options))

    @override
    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch, logged as ``train_loss``."""
        loss = self(batch["input_ids"], batch["labels"])
        # Without sync_dist: where on_oom="retry" repeats the step, not all processes get here equally often.
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=False)
        return loss

    @override
    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Counts one batch in ``val_loss`` and ``val_perplexity``."""
        # The first label of a row has no token before it that could predict it.
        num_tokens = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        if num_tokens > 0:  # the mean over no tokens is nan
            self.perplexity.update(self(batch["input_ids"], batch["labels"]) * num_tokens, num_tokens)

    @override
    def on_validation_epoch_end(self) -> None:
        """Logs both, from the sums over all batches and devices."""
        perplexity = self.perplexity.compute()
        self.perplexity.reset()
        self.log("val_perplexity", perplexity, prog_bar=True)
        self.log("val_loss", perplexity.log())

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        """The callback that weights losses, if asked for."""
        return [TokenWeights()] if self.token_weighted else []

    @override
    def configure_optimizers(self) -> Any:
        """The optimizer of the trainable parameters, with its scheduler if there is one."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3) if self.optimizer is None else self.optimizer(parameters)
        # A fused step offers to unscale fp16 gradients itself; Lightning then refuses to clip them, for bf16 as well.
        optimizer._step_supports_amp_scaling = False
        if self.scheduler is None:
            return optimizer
        schedule = {"scheduler": self.scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the states of all processes' random generators; leaves the frozen weights under adapters out."""
        trainer = self._trainer  # the property raises where there is none
        if trainer is None or trainer.world_size == 1:
            checkpoint["random_states"] = [random_states(self.device)]
        elif not trainer.interrupted:  # after an exception the other processes may be anywhere, and would not answer
            checkpoint["random_states"] = random_states_of_all_processes(self.device)
        if has_frozen_base(self.model):
            checkpoint["state_dict"] = without_frozen(checkpoint["state_dict"], self)
            checkpoint["frozen_weights"] = describe_frozen(self)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the random states for a fit that resumes, and checks the frozen weights.

        Raises:
            ValueError: The frozen weights are not those that the checkpoint's adapters were trained on, or the adapters
                are others.
        """
        resumes = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        self._states_to_restore = checkpoint.get("random_states") if resumes else None
        if has_frozen_base(self.model) or "frozen_weights" in checkpoint:
            check_same_base(checkpoint, self)
            self.strict_loading = False  # what is missing was looked through

    @override
    def on_fit_start(self) -> None:
        """Fits optimizers that step in the backward pass or on the host to the Trainer, without an MSTCallback, too.

        Raises:
            MisconfigurationException: the Trainer does what does not go with them.
        """
        connect_optimizers(self.trainer)

    @override
    def on_train_start(self) -> None:
        """Restores the random states of the checkpoint that training resumes from, so that dropout goes on alike."""
        # Only now: building and checking the model may have drawn random numbers.
        states, self._states_to_restore = self._states_to_restore, None
        if states is None:
            return
        if len(states) != self.trainer.world_size:
            rank_zero_warn(
                f"The checkpoint was written by {len(states)} processes, now there are {self.trainer.world_size}: their"
                " random states are not restored, so that dropout draws other masks than in an uninterrupted run."
            )
            return
        set_random_states(states[self.global_rank], self.device)
