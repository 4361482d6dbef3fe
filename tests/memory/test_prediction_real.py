"""Predictions against the tracked bytes of real steps in a real Trainer on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory_tools import (
    CONFIGS,
    PlainModel,
    adamw,
    adamw_in_backward,
    causal_lm,
    causal_loss,
    plain_loss,
    real_step,
    rehearsed_step,
    token_batch,
)
from torch import nn

from lightning_mst import MSTConfig
from lightning_mst.memory.moving import fake_modules_move
from lightning_mst.memory.quantized import quantize_fake
from lightning_mst.memory.rehearsal import Step, new_fake_mode, rehearse
from lightning_mst.rewrite.handle import apply_mst

TOLERANCE = 1e-3  # of the 3 %: what differs is a few scalars


def compare(
    model: nn.Module,
    config: str,
    *,
    tokens: tuple[int, int] = (1, 512),
    optimizer: Any = adamw,
    loss: Any = causal_loss,
    step: dict[str, Any] | None = None,
    **trainer: Any,
) -> None:
    batch = token_batch(*tokens)
    watch = real_step(model, [batch] * 4, loss, optimizer, CONFIGS[config], **trainer)
    held = rehearsed_step(model, batch, loss, optimizer, CONFIGS[config], **(step or {}))
    predicted = max(held.peaks.values(), key=lambda peak: peak.total)
    measured = max(watch.peaks.values(), key=lambda peak: peak.total)
    assert predicted.total == pytest.approx(measured.total, rel=TOLERANCE)
    for kind in ("weights", "optimizer_states", "buffers"):
        assert predicted.kinds.get(kind, 0) == pytest.approx(measured.kinds.get(kind, 0), rel=TOLERANCE, abs=1000)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("tokens", [(3, 171), (1, 2500), (2, 1300)])
def test_the_predicted_peak_of_a_step_is_the_real_one(config, tokens):
    compare(causal_lm(), config, tokens=tokens)


@pytest.mark.parametrize("config", ["off", "recompute"])
def test_it_is_in_bf16_and_under_autocast(config):
    compare(causal_lm(dtype=torch.bfloat16), config, precision="bf16-true")
    compare(causal_lm(), config, precision="bf16-mixed", step={"autocast": torch.bfloat16})


@pytest.mark.parametrize("config", ["off", "M=3,5"])
def test_it_is_with_other_optimizers(config):
    compare(causal_lm(), config, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    compare(causal_lm(), config, optimizer=adamw_in_backward)


def test_it_is_when_gradients_of_several_batches_are_added_up():
    compare(causal_lm(), "M=3,5", accumulate_grad_batches=2, batch=3, step={"accumulates": True})


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("GPT2", {"n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 1024, "attn_pdrop": 0.0}),
        ("Qwen2", {}),
        ("Phi3", {}),
        ("Gemma3Text", {"head_dim": 16}),
        ("Mixtral", {"num_local_experts": 4}),
    ],
)
def test_it_is_of_other_families(family, options):
    compare(causal_lm(family, **options), "M=3,5")


@pytest.mark.parametrize("config", ["off", "recompute", "M=3,5"])
def test_it_is_of_a_plain_module(config):
    compare(PlainModel(), config, loss=plain_loss)


def test_it_is_with_adapters():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(causal_lm(dtype=torch.bfloat16), lora).train()
    compare(model, "M=3,5", precision="bf16-mixed", step={"autocast": torch.bfloat16})


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_quantized_weights_and_adapters_are_built_without_values_as_they_are_with(weights):
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from lightning_mst.quantization import quantize

    def adapted(model: nn.Module) -> nn.Module:
        lora = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(model, lora).train()

    config = MSTConfig(3, 5, "all")
    batch, sizes = token_batch(1, 512), {"hidden_size": 128, "intermediate_size": 384, "dtype": torch.bfloat16}
    model = adapted(quantize(causal_lm(**sizes), weights))
    watch = real_step(model, [batch] * 4, causal_loss, adamw, config, precision="bf16-mixed")

    fake = new_fake_mode()
    with fake, fake_modules_move():
        twin = adapted(quantize_fake(causal_lm(**sizes), weights))
    apply_mst(twin, config)
    step = Step(batch, causal_loss, adamw, autocast=torch.bfloat16, on_gpu=False)
    held = rehearse(twin, step, fake)
    assert held.peak == pytest.approx(watch.total, rel=TOLERANCE)

    copied = rehearsed_step(model, batch, causal_loss, adamw, config, autocast=torch.bfloat16)
    assert copied.peak == held.peak
    # The table of 8-bit numbers that bitsandbytes keeps for all models is not a fake one now.
    assert quantize(causal_lm(**sizes), weights)(**batch).loss.isfinite()
