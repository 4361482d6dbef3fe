"""Gradients with layers' inputs and attention on the host, against the unmodified model."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from offload_models import (
    FEWEST_KV_HEADS,
    LAYERS,
    AttentionCalls,
    PlainModel,
    build,
    distance,
    gradients,
    leaves_nothing,
    loss_of,
    offload_of,
    plain_loss,
    tokens,
)
from torch import Tensor, nn

from lightning_mst import apply_mst

INPUTS = {"mlp_chunks": 3, "lm_head_chunks": None, "checkpoint_offload": "inputs"}
ATTENTION = {**INPUTS, "checkpoint_offload": "inputs+attention"}
WHOLE_LAYER = {**ATTENTION, "layer_chunks": 3}
MODES = {"inputs": INPUTS, "inputs+attention": ATTENTION, "whole layer": WHOLE_LAYER}
EXACT = 1e-10


def check(
    model: nn.Module, options: dict[str, Any], loss: Callable[[nn.Module], Tensor] = loss_of, within: float = EXACT
) -> None:
    expected = gradients(model, loss)
    handle = apply_mst(model, **options)
    with leaves_nothing(handle):
        for _ in range(2):  # the second time with slabs that held something else
            assert distance(gradients(model, loss), expected) < within
        assert offload_of(handle).memory.allocated > 0
    assert distance(gradients(model, loss), expected) == 0


FAMILIES = {
    "Llama": {},
    "Llama, MQA": {"num_key_value_heads": FEWEST_KV_HEADS},
    "Mistral": {"sliding_window": 9},
    "Qwen3": {"head_dim": 8},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 9, "query_pre_attn_scalar": 8},
    "Phi3": {},
    "GPT2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_exact_in_every_family(family, mode):
    # Gemma's norms scale in fp32, and so sum the gradients of their weights.
    within = 1e-8 if family.startswith("Gemma") else EXACT
    check(build(family.partition(",")[0], **FAMILIES[family]), MODES[mode], within=within)


def padded(model: nn.Module, side: str) -> Tensor:
    mask = torch.ones(2, 33, dtype=torch.long)
    if side == "left":
        mask[0, :7] = 0
    else:
        mask[0, -7:] = 0
    return loss_of(model, attention_mask=mask)


def packed(model: nn.Module) -> Tensor:
    return loss_of(model, position_ids=torch.cat([torch.arange(13), torch.arange(20)]).expand(2, -1))


@pytest.mark.parametrize("mode", MODES)
def test_they_are_with_padding_and_packed_sequences(mode):
    model = build()
    for loss in (partial(padded, side="left"), partial(padded, side="right"), packed):
        check(model, MODES[mode], loss)


@pytest.mark.parametrize("mode", MODES)
def test_they_are_with_adapters_on_frozen_weights(mode):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(build(), lora, autocast_adapter_dtype=False)
    check(model, MODES[mode])  # here the first layer's input has no graph
    model.enable_input_require_grads()
    check(model, MODES[mode])


def test_they_are_where_the_first_layers_are_frozen():
    model = build()
    for part in (model.model.embed_tokens, model.model.layers[0], model.model.layers[1]):
        part.requires_grad_(False)
    check(model, ATTENTION)


@pytest.mark.parametrize("what", ["inputs", "inputs+attention"])
def test_they_are_of_layers_that_are_not_transformers(what):
    options = {"mlp_chunks": None, "lm_head_chunks": None, "checkpoint_layers": "all", "checkpoint_offload": what}
    for dropout in (0.0, 0.3):
        check(PlainModel(dropout).double(), options, plain_loss)


def seq2seq_loss(model: nn.Module) -> Tensor:
    return loss_of(model, decoder_input_ids=tokens(2, 33).flip(1))


@pytest.mark.parametrize("family", ["Bart", "T5"])
def test_they_are_of_encoders_and_decoders(family):
    small = {"d_model": 32, "vocab_size": 97, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    if family == "Bart":
        small |= {f"{side}_{k}": n for side in ("encoder", "decoder") for k, n in
                  (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))}  # fmt: skip
        small |= {"dropout": 0.0, "forced_eos_token_id": None}
    else:
        small |= {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**small)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).train().double()
    check(model, INPUTS, seq2seq_loss)
    if family == "Bart":  # each of its decoder layers attends twice
        check(model, ATTENTION, seq2seq_loss)


def test_under_autocast_they_are_those_of_plain_checkpointing_bit_for_bit():
    model = build(dtype=torch.float32)

    def loss(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model)

    apply_mst(model, mlp_chunks=3, lm_head_chunks=None)
    expected = gradients(model, loss)
    for options in (INPUTS, ATTENTION):
        handle = apply_mst(model, **options)
        assert distance(gradients(model, loss), expected) == 0
        with leaves_nothing(handle):
            pass


def test_dropout_draws_the_same_again():
    # The numbers that attention's own dropout drew are not drawn again, but those after it are.
    library = torch.library.custom_op(
        "lightning_mst_tests::attention_with_dropout", _attention_with_dropout, mutates_args=(),
        schema="(Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor)",
    )  # fmt: skip
    library.register_autograd(
        lambda ctx, grad, _: (grad * ctx.saved_tensors[1],) * 3,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*output),
    )

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.dropout, self.out = nn.Linear(8, 24), nn.Dropout(0.5), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.out(self.dropout(library(*self.qkv(x).chunk(3, -1))[0]))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    options = {"mlp_chunks": None, "lm_head_chunks": None, "checkpoint_offload": "inputs+attention"}
    check(Model().double(), options, lambda model: model(x).square().sum())


def _attention_with_dropout(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    kept = (torch.rand_like(query) > 0.5).to(query.dtype)
    return (query + key + value) * kept, kept


@pytest.mark.parametrize("mode", MODES)
def test_several_forward_passes_before_a_backward_pass_and_kept_graphs_are_right(mode):
    model = build()
    other = tokens(1, 50)
    both = gradients(model, lambda model: loss_of(model) + 2 * loss_of(model, input_ids=other))
    one, two = gradients(model), gradients(model, lambda model: loss_of(model, input_ids=other))
    with leaves_nothing(apply_mst(model, **MODES[mode])):
        assert distance(gradients(model, lambda m: loss_of(m) + 2 * loss_of(m, input_ids=other)), both) < EXACT
        model.zero_grad()
        losses = [loss_of(model), loss_of(model, input_ids=other)]
        losses[0].backward()  # not the one that was computed last
        losses[1].backward()
        summed = {name: one[name] + two[name] for name in one}
        assert distance({name: p.grad for name, p in model.named_parameters()}, summed) < EXACT
        del losses
        model.zero_grad()
        loss = loss_of(model)
        loss.backward(retain_graph=True)
        loss.backward()
        del loss
        doubled = {name: 2 * one[name] for name in one}
        assert distance({name: p.grad for name, p in model.named_parameters()}, doubled) < EXACT


@pytest.mark.parametrize(("mode", "calls"), [("inputs", 2), ("inputs+attention", 1), ("whole layer", 1)])
def test_attention_is_computed_once_where_its_results_are_kept(mode, calls):
    model = build()
    apply_mst(model, **MODES[mode])
    with AttentionCalls() as attention:
        gradients(model)
    assert attention.count == calls * LAYERS


def test_two_models_and_copies_of_them_keep_apart():
    first, second = build(), build("Mistral")
    expected = [gradients(first), gradients(second)]
    handles = [apply_mst(model, **ATTENTION) for model in (first, second)]
    twin = copy.deepcopy(first)
    for model in (first, second, twin):
        model.zero_grad()
    losses = [loss_of(model) for model in (first, second, twin)]
    held = [offload_of(handle).memory.in_use for handle in handles]
    assert held[0] == held[1] > 0
    sum(losses).backward()
    for model, wanted in ((first, expected[0]), (second, expected[1]), (twin, expected[0])):
        assert distance({name: p.grad for name, p in model.named_parameters()}, wanted) < EXACT
    for handle in handles:
        with leaves_nothing(handle):
            pass


@pytest.mark.parametrize("mode", MODES)
def test_the_inputs_are_gone_from_the_device_when_their_layer_is_over(mode):
    model = build()
    seen: list[weakref.ref[Any]] = []
    apply_mst(model, **MODES[mode])
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0].untyped_storage())))
    loss = loss_of(model)
    assert [ref() is not None for ref in seen] == [False] * (LAYERS - 1) + [True]
    del loss
    assert not any(ref() is not None for ref in seen)
