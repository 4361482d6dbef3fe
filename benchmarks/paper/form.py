"""The paper's own code of July 2024, as far as memory is concerned, for the planner to rehearse.

Written from a description of what that code keeps and when, for today's transformers. Sources: the public repository
github.com/wdlctc/mini-s ("mini-s" below; commits 0afdced and 43dd0c4) and transformers 4.39 to 4.45, which it ran on.

* Weights and Adam states in bf16, flash attention: mini-s ``utils.py`` (``torch_dtype=torch.bfloat16``,
  ``flash_attention_2``). Grouped keys and values are not expanded (transformers ``LlamaFlashAttention2.forward``).
* One ``torch.optim.Adam(foreach=False)`` per weight, stepped in a hook of the backward pass: mini-s ``benchmark.py``.
  For accumulated gradients one ``AdamW`` over all of them: mini-s ``benchmark_gradient_accumlation.py``.
* Which script measures a form: ``scripts/benchmark.ipynb`` is the only one that does not recompute, ``benchmark.py``
  recomputes, ``benchmark_minis.py`` has mini-sequences; they differ in whether they hold on to the model's outputs.
* Documents of C4, padded to the length of the batch, with the mask: all scripts (the notebook draws random tokens; the
  paper's table 9 fits padding). Flash attention then works on copies
  of the tokens that are no padding (``_upad_input`` and ``pad_input`` of transformers): it keeps next to nothing.
* Reentrant checkpoints of whole layers: the default of ``gradient_checkpointing_enable()`` in those releases.
* Norms, rotary embeddings and MLPs keep the same tensors as in today's transformers, but for the rotary tables: those
  were made once per layer (512 bytes per token and layer, 0.2 % of what a layer keeps). Not modelled.
* In a batch of one sequence ``logits[..., :-1, :].contiguous()`` is a view: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mst import OptimizerInBackward
from lightning_mst.memory import attention

Form = Literal["standard", "recompute", "mst"]

MLP_CHUNKS = 8
"""Mini-sequences of an MLP: ``pretraining_tp`` of ``LlamaMLP`` in mini-s ``transformers_mini_s``."""
HEAD_CHUNKS = 32
"""Mini-sequences of the LM head: ``pretraining_tp`` of ``LlamaForCausalLM`` there."""
REAL_TOKENS = 427
"""Tokens of a C4 document, 156e9 / 365e6 (Dodge et al. 2021, arXiv 2104.08758); the rest of a sequence is padding."""


def prepare(form: Form) -> Callable[[nn.Module], nn.Module]:
    """What puts a model of today's transformers into the memory behaviour of the paper's code."""

    def prepared(model: nn.Module) -> nn.Module:
        if form != "standard":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        if form == "mst":
            for layer in model.model.layers:
                layer.mlp = ChunkedMLP(layer.mlp)
        return model

    return prepared


class ChunkedMLP(nn.Module):
    """An MLP on one mini-sequence after the other, under plain autograd.

    In the forward pass of a checkpointed layer only one mini-sequence's intermediates are alive; in its backward pass
    those of all, because each stays until its own gradient comes. Source: ``LlamaMLP.forward`` of mini-s
    ``transformers_mini_s``, and ``LlamaMLPWarpper`` of its ``minis/mini_sequence.py``.
    """

    def __init__(self, mlp: nn.Module, num_chunks: int = MLP_CHUNKS) -> None:
        super().__init__()
        self.mlp = mlp
        self.num_chunks = num_chunks

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, S, D)`` to ``(B, S, D)``."""
        return torch.cat([self.mlp(chunk) for chunk in x.split(-(-x.shape[1] // self.num_chunks), dim=1)], dim=1)


class Loss:
    """From a model and a batch to the loss, as the paper's scripts compute it.

    Args:
        form: ``"mst"`` has its LM head in mini-sequences; the others have that of transformers.
        keeps_outputs: whether the script holds on to the model's outputs, and so to all logits, during the backward
            pass: ``outputs = model(...)`` in mini-s ``benchmark.py``, but ``model(...).loss`` in
            ``scripts/benchmark.ipynb`` and ``benchmark_gradient_accumlation.py``. Default: as in the form's own script.
        padded: whether most of a sequence is padding that attention leaves out.
        zeroes_gradients: ``optimizer.zero_grad()`` comes before the forward pass, not after it as in Lightning.
    """

    def __init__(
        self, form: Form, *, keeps_outputs: bool | None = None, padded: bool = True, zeroes_gradients: bool = False
    ) -> None:
        self._form = form
        self._keeps_outputs = form == "recompute" if keeps_outputs is None else keeps_outputs
        self._padded = padded
        self._zeroes_gradients = zeroes_gradients
        self._outputs: Tensor | None = None

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if self._zeroes_gradients:
            model.zero_grad()
        if self._padded:
            _leave_padding_out()
        hidden = model.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        labels = batch["labels"][..., 1:].contiguous()
        if self._form == "mst":
            return HeadInChunks.apply(hidden[:, :-1].flatten(0, 1), model.lm_head.weight, labels.view(-1), HEAD_CHUNKS)
        logits = standard_logits(model, hidden)
        self._outputs = logits if self._keeps_outputs else None
        shifted = logits[..., :-1, :].contiguous()
        return F.cross_entropy(shifted.view(-1, shifted.shape[-1]), labels.view(-1))


def standard_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """All logits (B, S, V) in fp32: ``logits = logits.float()`` in every causal language model up to transformers 4.44.

    Gemma-2's soft-cap comes before that, in bf16 (``Gemma2ForCausalLM.forward`` of 4.42).
    """
    logits = model.lm_head(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits.float()


class HeadInChunks(torch.autograd.Function):
    """LM head and loss on one mini-sequence after the other, whose gradients are formed in the forward pass.

    A mini-sequence takes 10 bytes for each of its logits: fp32 logits, fp32 softmax, and its copy in bf16. The gradient
    of the weight is added up in bf16. Source: ``_cross_entropy`` of mini-s ``minis/mini_sequence.py`` at 0afdced; no
    soft-cap is applied there. (There the weight's gradient is written to ``.grad`` by hand, so that the hook that
    steps never comes, and the head stays without Adam states. The paper counts states for all weights (table 11: 30
    GB), and so does this.)
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, num_chunks: int) -> Tensor:
        """Tokens ``(N, D)``, weight ``(V, D)`` and labels ``(N,)`` to a loss; drops the tokens that are left over."""
        grad_weight: Tensor | None = None
        grads = []
        losses = []
        size = hidden.shape[0] // num_chunks
        for tokens, targets in zip(hidden.split(size)[:num_chunks], labels.split(size)[:num_chunks], strict=True):
            logits = F.linear(tokens, weight).float()
            losses.append(F.cross_entropy(logits, targets, reduction="sum"))
            grad_logits = F.softmax(logits, dim=-1)
            grad_logits = grad_logits.to(tokens.dtype)
            if grad_weight is None:
                grad_weight = grad_logits.t() @ tokens
            else:
                grad_weight.addmm_(grad_logits.t(), tokens)
            grads.append(grad_logits @ weight)
            del logits, grad_logits
        ctx.save_for_backward(grad_weight, *grads)
        ctx.num_left_over = hidden.shape[0] - size * num_chunks
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Hands out the gradients of the hidden states and of the weight."""
        grad_weight, *grads = ctx.saved_tensors
        left_over = grads[0].new_zeros(ctx.num_left_over, grads[0].shape[1])
        return torch.cat([*grads, left_over]), grad_weight, None, None


def _leave_padding_out() -> None:
    """Lets attention work on the first tokens alone, until a rehearsal begins anew."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    flash = ALL_ATTENTION_FUNCTIONS[attention.NAME]

    def unpadded(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, None]:
        length = query.shape[2]
        real = min(length, REAL_TOKENS)
        out, _ = flash(module, *(t[:, :, :real].clone() for t in (query, key, value)), None)  # (B, real, H, D)
        return F.pad(out, (0, 0, 0, 0, 0, length - real)), None

    AttentionInterface.register(attention.NAME, unpadded)


def adam_in_backward(model: nn.Module) -> OptimizerInBackward:
    """One Adam per weight, stepped in the backward pass."""
    return OptimizerInBackward(model.parameters(), torch.optim.Adam, lr=5e-5, foreach=False)


def adam_at_end(model: nn.Module) -> torch.optim.Optimizer:
    """One AdamW for all weights, which keeps their gradients until its step."""
    return torch.optim.AdamW(model.parameters(), lr=5e-5)
