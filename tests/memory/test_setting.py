"""A model and its training on fake tensors: the dtypes, the optimizer and the form that a real run would have."""

from __future__ import annotations

import pytest
import torch
from memory_tools import SIZES, adamw, causal_lm
from torch import nn

from lightning_mst import MSTConfig
from lightning_mst.memory.setting import Setting, Training


def build() -> nn.Module:
    return causal_lm(dtype=torch.get_default_dtype(), num_hidden_layers=2)


def training(precision: str = "32-true", **options) -> Training:
    return Training(precision=precision, make_optimizer=adamw, device="cpu", **options)


def bytes_of_weights(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize(("precision", "size"), [("64-true", 8), ("bf16-true", 2), ("bf16-mixed", 4)])
def test_weights_and_their_states_have_the_dtype_of_the_precision(precision, size):
    setting = Setting(build, training(precision))

    kinds = setting.predict(MSTConfig(), 64).kinds

    numel = sum(p.numel() for p in setting.model.parameters())
    assert kinds["weights"] == size * numel
    assert kinds["optimizer_states"] == pytest.approx(2 * size * numel, rel=1e-3)
    assert torch.get_default_dtype() == torch.float32


def test_a_module_is_copied_without_its_values_and_left_alone():
    model = causal_lm(num_hidden_layers=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    forward = model.model.layers[0].mlp.forward

    copied = Setting(model, training()).predict(MSTConfig(), 128)

    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert model.model.layers[0].mlp.forward == forward
    assert copied == Setting(build, training()).predict(MSTConfig(), 128)


def test_one_setting_predicts_forms_and_lengths_in_any_order():
    once = Setting(build, training())
    off, auto = MSTConfig(None, None, "none"), MSTConfig(4, 4)
    mixed = [once.predict(*case).total for case in ((off, 256), (auto, 512, 2), (off, 512), (off, 256))]

    assert mixed[0] == mixed[3] < mixed[2]
    assert mixed[1] == Setting(build, training()).predict(auto, 512, 2).total


def test_what_is_prepared_is_what_is_trained():
    def freeze(model: nn.Module) -> nn.Module:
        model.requires_grad_(False)
        model.lm_head.weight.requires_grad_(True)
        return model

    kinds = Setting(build, training(prepare=freeze)).predict(MSTConfig(), 64).kinds

    assert kinds["optimizer_states"] == pytest.approx(2 * 4 * SIZES["vocab_size"] * SIZES["hidden_size"], rel=1e-3)


def test_accumulated_gradients_stay():
    once = Setting(build, training()).predict(MSTConfig(), 64)
    accumulated = Setting(build, training(accumulate_grad_batches=2)).predict(MSTConfig(), 64)

    assert accumulated.kinds["gradients"] >= once.kinds["gradients"]
    assert accumulated.phase != "optimizer"


def test_a_loss_of_ones_own_is_the_one_that_counts():
    def first_token_only(model: nn.Module, batch):
        return model(input_ids=batch["input_ids"]).logits[:, 0].logsumexp(-1).sum()

    own = Setting(build, training(compute_loss=first_token_only)).predict(MSTConfig(None, None, "none"), 512)
    usual = Setting(build, training()).predict(MSTConfig(None, None, "none"), 512)

    assert own.total < usual.total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "8-true"}, "precision='8-true' is not known. Expected one of 64-true"),
        ({"device": "abacus"}, "device='abacus' is not known. Expected one of cuda, cpu"),
    ],
)
def test_unknown_names_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Training(**{"precision": "32-true", "make_optimizer": adamw, **options})


def test_a_function_that_builds_no_module_is_refused():
    with pytest.raises(TypeError, match="returned str, not a module"):
        Setting(lambda: "model", training())
