"""An LM head that answers with deferred logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_mst.ops.chunking import few_logits, lm_head_split
from lightning_mst.ops.context import AutocastState, RNGState, drop_autocast_copies
from lightning_mst.ops.deferred_logits import Request, defer_logits
from lightning_mst.ops.heads import Head, LinearHead, ModuleHead
from lightning_mst.rewrite.costs import head_cost
from lightning_mst.rewrite.fsdp1 import weights_of
from lightning_mst.rewrite.pace import Pace
from lightning_mst.rewrite.shadow import form_of, original_forward, shadow_method
from lightning_mst.rewrite.stand_in import is_sharded
from lightning_mst.rewrite.tensor_parallel import LocalAnswer, is_distributed, whole_head

REQUEST = "mst_request"
"""The keyword by which a head is given a request."""


@dataclass
class LMHeadForm:
    """The settings of a rewritten head."""

    chunks: int | str
    pace: Pace = field(default_factory=Pace)
    # V and the logits' dtype of a head that is not linear, by all that may change them.
    probed: dict[Any, tuple[int, torch.dtype]] = field(default_factory=dict)


def rewrite_lm_head(head: nn.Module, chunks: int | str) -> None:
    """Lets an LM head answer with deferred logits, on which a loss runs over mini-sequences.

    Args:
        head: a module from (..., D) to (..., V) that treats every token alike: an ``nn.Linear``, or any other.
        chunks: M, ``"auto"`` or ``"paper"``.
    """
    shadow_method(head, _lm_head_forward, LMHeadForm(chunks))


@dataclass(frozen=True)
class Ask:
    """Runs a request inside a head's forward; equal for two calls of one head, so that one gathering serves both."""

    module: nn.Module

    def __call__(self, request: Request, hidden: Tensor) -> tuple[Tensor, ...]:
        """Returns the request's answer."""
        # Through __call__, so that whoever gathers the weights in a forward hook (FSDP, ZeRO) gathers them now, once.
        # By name: tensor parallelism's hooks drop all positional arguments but the first.
        return self.module(hidden, **{REQUEST: request})


def _lm_head_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if len(args) == 1 and kwargs.keys() == {REQUEST}:
        (hidden,), request = args, kwargs[REQUEST]
        answer = request(*_whole_head(self, hidden))
        return LocalAnswer(answer) if is_distributed(hidden) else answer
    given = hidden_states_of(args, kwargs)
    if given is None:
        return original_forward(self)(*args, **kwargs)
    form: LMHeadForm = form_of(self)
    hidden, head = _whole_head(self, given)
    hidden_size = hidden.shape[-1]
    if form.pace.factor == 1 and few_logits(
        form.chunks,
        num_tokens=hidden.numel() // max(1, hidden_size),
        vocab_size=head.vocab_size,
        element_size=hidden.element_size(),
    ):
        return original_forward(self)(given)
    return deferred(self, form, hidden, head)


def hidden_states_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states in a call of a head, or ``None`` for a call that is not to be answered with deferred logits."""
    if not args and kwargs.keys() == {"input"}:
        args, kwargs = (kwargs["input"],), {}
    if len(args) != 1 or kwargs:
        # Arguments that mini-sequences know nothing of.
        return None
    (given,) = args
    is_generation = not torch.is_grad_enabled() and (given.dim() < 2 or given.shape[-2] == 1)
    return None if is_generation else given


def deferred(module: nn.Module, form: LMHeadForm, hidden: Tensor, head: Head) -> Tensor:
    """Deferred logits whose losses ask ``module``."""
    split = lm_head_split(
        form.chunks,
        hidden_size=hidden.shape[-1],
        vocab_size=head.vocab_size,
        num_tokens=hidden.numel() // max(1, hidden.shape[-1]),
        cost=head_cost(head.parameters, head.vocab_size, head.logits_dtype(hidden, AutocastState.now(hidden.device))),
    )
    return defer_logits(hidden, head, split=form.pace.split(split), run=Ask(module))


def _whole_head(module: nn.Module, hidden: Tensor) -> tuple[Tensor, Head]:
    """The head and its hidden states, as functions of and plain tensors of whole vectors."""
    if is_distributed(hidden):
        return whole_head(module, original_forward(module), hidden)
    return hidden, head_of(module, hidden)


def head_of(module: nn.Module, hidden: Tensor) -> Head:
    """A rewritten module, whose weights are at hand, as a function of hidden states (..., D)."""
    forward = original_forward(module)
    if getattr(forward, "__func__", None) is nn.Linear.forward and not _is_wrapped(module.weight):
        return LinearHead(module.weight, module.bias)
    parameters = tuple(module.parameters())
    # FSDP1 may have put views in the parameters' place.
    parameters = tuple(dict.fromkeys(weights_of(module)))
    key = tuple(p.shape for p in parameters)
    return ModuleHead(forward, parameters, *probed_logits(forward, hidden, form_of(module), key))


def probed_logits(
    forward: Callable[[Tensor], Tensor], hidden: Tensor, form: LMHeadForm, key: object
) -> tuple[int, torch.dtype]:
    """V and the dtype of the logits that ``forward`` gives for ``hidden``, tried out on one token.

    Args:
        forward: from (1, D) to (1, V).
        hidden: (..., D).
        form: remembers the answer.
        key: whatever else may change it, besides the dtype of ``hidden`` and autocast.
    """
    key = key, hidden.shape[-1], hidden.dtype, AutocastState.now(hidden.device)
    if key not in form.probed:
        with torch.no_grad(), RNGState(hidden.device).replayed():
            logits = forward(hidden.new_zeros(1, hidden.shape[-1]))
        drop_autocast_copies()
        form.probed[key] = logits.shape[-1], logits.dtype
    return form.probed[key]


def _is_wrapped(weight: Tensor) -> bool:
    """Whether a weight has arithmetic of its own, as quantized ones have; not so a sharded one."""
    return is_traceable_wrapper_subclass(weight) and not is_sharded(weight)
