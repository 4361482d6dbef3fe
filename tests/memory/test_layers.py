"""A few layers speak for all of them."""

from __future__ import annotations

import pytest
import torch
import transformers
from memory_tools import (
    CONFIGS,
    VOCAB,
    PlainModel,
    adamw,
    adamw_in_backward,
    causal_lm,
    causal_loss,
    plain_loss,
    token_batch,
)

from lightning_mst import MSTConfig
from lightning_mst.memory.layers import depth_of, peaks_of
from lightning_mst.memory.rehearsal import Step, new_fake_mode, rehearse
from lightning_mst.rewrite.handle import apply_mst

LAYERS = 8


def compare(build, config, optimizer=adamw, loss=causal_loss, **step):
    fake = new_fake_mode()
    with fake:
        model = build().train()
    if not config.asks_for_nothing:
        apply_mst(model, config)
    step = Step(token_batch(1, 256), loss, optimizer, **step)

    def run():
        return rehearse(model, step, fake, vocab_size=VOCAB).peaks

    place, whole = max(run().items(), key=lambda item: item[1].total)
    role, predicted = max(peaks_of(model, run).items(), key=lambda item: item[1].total)
    assert (predicted.total, dict(predicted.kinds)) == (
        whole.total,
        {k: whole.kinds.get(k, 0) for k in predicted.kinds},
    )
    assert (role.phase, role.block) == (place.phase, place.block)


def of_family(family, **options):
    return lambda: causal_lm(family, **{"num_hidden_layers": LAYERS, **options})


@pytest.mark.parametrize("config", ["off", "recompute", "M=3,5", "M=4 kept"])
@pytest.mark.parametrize("optimizer", [adamw, adamw_in_backward])
def test_the_peak_of_a_deep_model_follows_from_shallow_ones(config, optimizer):
    compare(of_family("Llama"), CONFIGS[config], optimizer)


@pytest.mark.parametrize("layers", [3, [0, 1, 2], [5, 6, 7], [0, 3, 4]])
def test_it_does_when_some_layers_are_checkpointed(layers):
    compare(of_family("Llama"), MSTConfig(None, None, layers))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("GPT2", {"n_embd": 64, "n_head": 4, "n_layer": LAYERS, "n_positions": 1024}),
        ("Llama", {"tie_word_embeddings": True}),
        # Local and global attention by turns, with rotary embeddings of their own.
        ("Gemma3Text", {"head_dim": 16, "num_hidden_layers": 12}),
        # Experts in every other layer.
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16,
                      "decoder_sparse_step": 2}),
    ],
)  # fmt: skip
def test_it_does_for_layers_of_several_kinds(family, options):
    compare(of_family(family, **options), CONFIGS["recompute"])


def test_it_does_for_an_encoder_with_a_decoder():
    config = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=224, num_layers=5, num_decoder_layers=6, num_heads=4, vocab_size=VOCAB,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    compare(lambda: transformers.T5ForConditionalGeneration(config), CONFIGS["recompute"])


def test_it_does_for_a_plain_module_under_ddp():
    compare(lambda: PlainModel(layers=LAYERS), CONFIGS["off"], loss=plain_loss, strategy="ddp", num_devices=2)


def test_layers_of_different_settings_are_different_groups_and_the_model_stays_as_it_is():
    with new_fake_mode() as fake:
        model = causal_lm("Gemma3Text", head_dim=16, num_hidden_layers=12)
    kinds, names = list(model.config.layer_types), [name for name, _ in model.named_modules()]
    assert [len(group) for group in depth_of(model).groups] == [10, 2]
    step = Step(token_batch(1, 64), causal_loss, lambda _: None)
    peaks_of(model, lambda: rehearse(model, step, fake).peaks)
    assert model.config.layer_types == kinds
    assert [name for name, _ in model.named_modules()] == names
    assert torch.is_tensor(model.lm_head.weight)
