"""An LM head that answers with deferred logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mst.ops.chunking import few_logits, lm_head_split
from lightning_mst.ops.deferred_logits import Request, defer_logits
from lightning_mst.rewrite.shadow import form_of, original_forward, shadow_forward


@dataclass
class _LMHeadForm:
    chunks: int | str


def rewrite_lm_head(head: nn.Module, chunks: int | str) -> None:
    """Lets an LM head answer with deferred logits, on which a loss runs over mini-sequences.

    Args:
        head: an ``nn.Linear`` from (..., D) to (..., V).
        chunks: M, ``"auto"`` or ``"paper"``.
    """
    shadow_forward(head, _lm_head_forward, _LMHeadForm(chunks))


def _lm_head_forward(self: nn.Linear, input: Tensor, request: Request | None = None) -> Any:
    if request is not None:
        return request(input, self.weight, self.bias)
    form: _LMHeadForm = form_of(self)
    vocab_size, hidden_size = self.weight.shape
    one_token = not torch.is_grad_enabled() and (input.dim() < 2 or input.shape[-2] == 1)
    if one_token or few_logits(
        form.chunks,
        num_tokens=input.numel() // max(1, hidden_size),
        vocab_size=vocab_size,
        element_size=input.element_size(),
    ):
        return original_forward(self)(input)

    def run(request: Request, hidden: Tensor) -> tuple[Tensor, ...]:
        # Through __call__, so that whoever gathers the weights in a forward hook (FSDP, ZeRO) gathers them now, once.
        return self(hidden, request)

    return defer_logits(
        input,
        self.weight,
        self.bias,
        split=lm_head_split(form.chunks, hidden_size=hidden_size, vocab_size=vocab_size),
        run=run,
    )
