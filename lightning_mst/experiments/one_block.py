"""A block by itself, as a model runs it: forward and backward of the LM head with its loss, or of one MLP."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from lightning_mst.models import loss_of
from lightning_mst.rewrite.handle import apply_mst

__all__ = ["KINDS", "Block", "Kind"]

Kind = Literal["lm_head", "mlp"]
KINDS: dict[str, tuple[str, str]] = {"lm_head": ("LM head", "lm_head_chunks"), "mlp": ("MLP", "mlp_chunks")}
"""By name: what the table of a rewritten model calls the block, and the option that sets its M."""


class Block:
    """The LM head with its loss, or the first MLP, of a model whose other parts don't run.

    It is rewritten by ``apply_mst``, so that what runs is what a user gets, and so is the loss: the model's own, with
    all that the model does to logits before it.

    Args:
        model: A causal language model of transformers, rewritten in place. One layer is enough.
        kind: Which block.
        autocast: The dtype of mixed precision, or None.

    Raises:
        ValueError: There is no such block that can run in mini-sequences.
    """

    def __init__(self, model: nn.Module, kind: Kind, *, autocast: torch.dtype | None = None) -> None:
        title, self._option = KINDS[kind]
        off: dict[str, Any] = {"mlp_chunks": None, "lm_head_chunks": None, "checkpoint_layers": "none"}
        self._handle = apply_mst(model, **(off | {self._option: 1}))
        self._kind = kind
        self._model = model
        self._autocast = autocast
        self.name = next(row.name for row in self._handle.rows if row.block == title and row.rewritten)
        self._module = model.get_submodule(self.name)
        if kind == "mlp":
            # A norm or dropout behind a hooked MLP does not become a part of it: hooks expect the MLP's own output.
            self._module.register_forward_hook(lambda *_: None)
        self._decoder = model.get_decoder() if kind == "lm_head" else None

    @property
    def weights(self) -> list[nn.Parameter]:
        """The block's own parameters."""
        return list(self._module.parameters())

    def set_chunks(self, num_chunks: int | None) -> None:
        """Puts the block into M mini-sequences, or into its standard form."""
        options: dict[str, Any] = {self._option: num_chunks}
        self._handle.update(**options)

    def step(self, hidden: Tensor, labels: Tensor) -> None:
        """Runs forward and backward, and drops the gradients.

        Args:
            hidden: What comes into the block, of shape (B, S, D); requires grad.
            labels: int64 of shape (B, S), for the LM head; not shifted.
        """
        with self._precision(hidden.device):
            out = self._loss(hidden, labels) if self._kind == "lm_head" else self._module(hidden)
        # The gradient of an MLP's output exists in a training step, too.
        out.backward(None if out.dim() == 0 else torch.ones_like(out))
        for tensor in (hidden, *self.weights):
            tensor.grad = None

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        def instead_of_layers(*_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPast:
            return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)

        assert self._decoder is not None
        self._decoder.forward = instead_of_layers
        try:
            return loss_of(self._model(inputs_embeds=hidden, labels=labels, use_cache=False))
        finally:
            del self._decoder.forward  # the class's own is there again

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext() if self._autocast is None else torch.autocast(device.type, dtype=self._autocast)
