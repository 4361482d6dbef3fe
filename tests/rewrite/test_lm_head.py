"""LM heads of any kind answer with deferred logits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mst.ops.deferred_logits import DeferredLogits
from lightning_mst.rewrite.lm_head import rewrite_lm_head
from lightning_mst.rewrite.shadow import restore

B, S, D, V = 2, 7, 6, 13


def low_rank() -> nn.Module:
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"head": nn.Linear(D, V)})
    config = peft.LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)
    return peft.get_peft_model(model, config).base_model.model["head"]


def saved_whole() -> nn.Module:
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"other": nn.Linear(D, D), "head": nn.Linear(D, V)})
    config = peft.LoraConfig(r=2, target_modules=["other"], modules_to_save=["head"])
    return peft.get_peft_model(model, config).base_model.model["head"]


def dora() -> nn.Module:
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"head": nn.Linear(D, V)})
    config = peft.LoraConfig(r=2, target_modules=["head"], use_dora=True, init_lora_weights=False)
    return peft.get_peft_model(model, config).base_model.model["head"]


HEADS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D, V),
    "transform": lambda: nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D), nn.Linear(D, V)),
    "LoRA": low_rank,
    "DoRA": dora,
    "modules_to_save": saved_whole,
}  # fmt: skip


def flat_ce(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).mean()


@pytest.mark.parametrize("loss", [flat_ce, log_probs])
@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradients_are_those_of_the_head_as_it_was(name: str, loss: Callable[..., Tensor]) -> None:
    head = HEADS[name]().double()
    hidden = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(V, (B, S))
    wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    plain = head(hidden)
    expected = loss(plain, labels)
    expected_grads = torch.autograd.grad(expected, wanted, allow_unused=True)
    rewrite_lm_head(head, 3)
    logits = head(hidden)
    assert isinstance(logits, DeferredLogits)
    assert (logits.shape, logits.dtype) == (plain.shape, plain.dtype)
    value = loss(logits, labels)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    for grad, other in zip(torch.autograd.grad(value, wanted, allow_unused=True), expected_grads, strict=True):
        assert (grad is None) == (other is None)
        if grad is not None:
            torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-12)
    assert logits._real is None
    restore(head)
    assert not isinstance(head(hidden), DeferredLogits)


@pytest.mark.parametrize("name", ["linear", "transform"])
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copied_head_uses_its_own_weights(name: str, twin: Callable[[nn.Module], nn.Module]) -> None:
    head = HEADS[name]()
    rewrite_lm_head(head, 2)
    hidden = torch.randn(B, S, D)
    head(hidden)
    other = twin(head)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    restored = copy.deepcopy(other)
    restore(restored)
    expected = flat_ce(restored(hidden), torch.zeros(B, S).long())
    torch.testing.assert_close(flat_ce(other(hidden), torch.zeros(B, S).long()), expected)


@pytest.mark.parametrize("name", ["linear", "transform"])
def test_the_dtype_is_that_of_the_head_under_autocast(name: str) -> None:
    head, hidden = HEADS[name](), torch.randn(B, S, D)
    plain = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            plain.append(head(hidden).dtype)
    rewrite_lm_head(head, 2)
    for enabled, dtype in zip((False, True), plain, strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = head(hidden)
            assert logits.dtype == dtype
            flat_ce(logits, torch.zeros(B, S).long()).backward()


def test_asking_for_the_size_draws_no_random_numbers() -> None:
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(D, V))
    rewrite_lm_head(head, 2)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    head(torch.randn(0, S, D))
    assert torch.equal(torch.rand(1), expected)


class Masked(nn.Linear):
    def forward(self, input: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return super().forward(input if mask is None else input * mask) * scale


@pytest.mark.parametrize(
    "call", [lambda h, x: h(x, torch.ones(S, 1) * 2), lambda h, x: h(x, scale=3.0), lambda h, x: h(x, None, 2.0)]
)
def test_a_head_called_with_more_than_hidden_states_answers_as_it_did(call: Callable[..., Any]) -> None:
    head, hidden = Masked(D, V), torch.randn(B, S, D)
    expected = call(head, hidden)
    rewrite_lm_head(head, 2)
    answer = call(head, hidden)
    assert type(answer) is Tensor
    assert torch.equal(answer, expected)


def test_a_head_called_by_keyword_answers_with_deferred_logits() -> None:
    head = nn.Linear(D, V)
    rewrite_lm_head(head, 2)
    assert isinstance(head(input=torch.randn(B, S, D)), DeferredLogits)
