"""Norms, projections and rotary embeddings in mini-sequences: the same gradients, and no matmul more."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rewrite_models import BASE, FAMILIES, VOCAB, build, distance, furthest, gradients, multiply_adds
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_mst import MSTConfig, apply_mst
from lightning_mst.memory import TensorBytes
from lightning_mst.rewrite import attention as attention_module

OPTIONS = {"mlp_chunks": 4, "lm_head_chunks": 4, "layer_chunks": 3}
SDPA = {"attn_implementation": "sdpa"}
Loss = Callable[[nn.Module], Tensor]


@pytest.fixture(params=[1, 2])
def groups(request, monkeypatch) -> int:
    """Attention by all heads at once, or by two groups of them, as long sequences have it."""
    monkeypatch.setattr(attention_module, "_MOST_GROUPS", request.param)
    monkeypatch.setattr(attention_module, "_LEAST_QUERIES", 1)
    return request.param


def own_loss(ids: Tensor, labels: Tensor, **inputs: Tensor) -> Loss:
    def loss(model: nn.Module) -> Tensor:
        logits = model(input_ids=ids, use_cache=False, **inputs).logits
        return F.cross_entropy(logits[..., :-1, :].reshape(-1, VOCAB), labels[..., 1:].reshape(-1))

    return loss


def check_exact(model: nn.Module, loss: Loss, tolerance: float = 1e-10, **options: object) -> None:
    expected_loss = loss(model)
    expected = gradients(model, expected_loss)
    handle = apply_mst(model, **{**OPTIONS, **options})
    assert {row.form for row in handle.rows if row.block == "attention"} == {"M = 3"}
    got = loss(model)
    assert got.item() == pytest.approx(expected_loss.item(), rel=1e-6 if tolerance > 1e-10 else 1e-12)
    assert furthest(gradients(model, got), expected) < tolerance


INPUTS: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "whole sequences": lambda ids: {},
    "padded right": lambda ids: {"attention_mask": (torch.arange(33)[None] < torch.tensor([[33], [20]])).long()},
    "padded left": lambda ids: {"attention_mask": (torch.arange(33)[None] >= torch.tensor([[0], [9]])).long()},
    "packed": lambda ids: {"position_ids": torch.stack([torch.arange(33) % 14, torch.arange(33) % 20])},
}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama 3", {}),
        ("Llama 3", {"num_attention_heads": 8, "num_key_value_heads": 8}),
        ("Llama 3", {"num_key_value_heads": 1}),
        ("Mistral", {"sliding_window": 7}),
        ("Qwen3", {}),
        ("Phi-3", {"sliding_window": 7}),
    ],
    ids=["grouped queries", "a key for each query", "one key for all", "sliding window", "norms of q and k", "fused"],
)
def test_gradients_are_exact_whatever_the_heads_and_the_mask(family, options, inputs, batch, groups):
    ids, labels = batch
    model = build(family, **{**SDPA, **options})
    check_exact(model, own_loss(ids, labels, **INPUTS[inputs](ids)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpoint_layers", ["all", "none"])
def test_every_family_is_exact_with_its_own_attention_function(family, checkpoint_layers, batch):
    # Gemma's norms compute in fp32 whatever the model's dtype.
    tolerance = 1e-6 if "Gemma" in family else 1e-10
    check_exact(build(family), own_loss(*batch), tolerance, checkpoint_layers=checkpoint_layers)


@pytest.mark.parametrize("family", ["Llama 3", "Qwen3", "Gemma 2"])
def test_single_precision_and_bf16_are_as_exact_as_the_unmodified_models(family, batch, groups):
    loss = own_loss(*batch)
    truth_model = build(family)
    truth = gradients(truth_model, loss(truth_model))

    def error(model: nn.Module, autocast: bool) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(model)
        got = gradients(model, value)
        squares = [((got[n].double() - e).norm() ** 2, e.norm() ** 2) for n, e in truth.items()]
        return float((sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5)

    for dtype, autocast in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        model = copy.deepcopy(truth_model).to(dtype)
        before = error(model, autocast)
        apply_mst(model, **OPTIONS)
        after = error(model, autocast)
        assert after <= (1e-5 if dtype == torch.float32 and not autocast else 1.1 * before)


@pytest.mark.parametrize("chunks", ["auto", "paper", 1, 7, 1000])
def test_any_number_of_mini_sequences_is_exact(chunks, batch):
    model, loss = build("Llama 3", **SDPA), own_loss(*batch)
    expected = gradients(model, loss(model))
    apply_mst(model, layer_chunks=chunks, mlp_chunks=2)
    assert distance(gradients(model, loss(model)), expected) < 1e-10


def test_adapters_on_every_projection_are_exact_and_the_frozen_weights_get_no_gradient(batch, groups):
    pytest.importorskip("peft")
    from adapter_models import adapted, lora

    model = adapted(lora())
    check_exact(model, own_loss(*batch))
    assert all("lora" in name for name, p in model.named_parameters() if p.grad is not None)


def test_accumulated_and_scaled_gradients_are_exact(batch):
    ids, labels = batch
    model = build("Llama 3", **SDPA)

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        for rows in (slice(0, 1), slice(1, 2)):
            (1024 * own_loss(ids[rows], labels[rows])(model)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = step()
    apply_mst(model, **OPTIONS)
    assert distance(step(), expected) < 1e-10


@pytest.mark.parametrize("family", ["Llama 3", "Qwen3", "Phi-3", "Mistral", "GPT-2", "Gemma 2"])
def test_no_matmul_is_computed_more_often_than_under_plain_checkpointing(family, batch):
    loss = own_loss(*batch)
    counts = []
    for options in ({"mlp_chunks": None, "lm_head_chunks": None}, {**OPTIONS, "lm_head_chunks": None}):
        model = build(family, torch.float32)
        apply_mst(model, **options)
        with FlopCounterMode(display=False) as counter:
            gradients(model, loss(model))
        counts.append(counter.get_total_flops())
    assert counts[1] <= counts[0]


def test_adapters_matmuls_are_not_repeated_either(batch):
    pytest.importorskip("peft")
    from adapter_models import ATTENTION, adapted, lora

    counts = []
    for options in ({"mlp_chunks": None, "lm_head_chunks": None}, {**OPTIONS, "lm_head_chunks": None}):
        model = adapted(lora(ATTENTION))
        apply_mst(model, **options)
        counts.append(multiply_adds(model, lambda model=model: own_loss(*batch)(model), 48, 24, 4))
    assert counts[1] <= counts[0]


def test_a_layer_holds_less_than_with_its_mlp_alone_in_mini_sequences():
    ids = torch.randint(3, VOCAB, (1, 2048))

    def peak(**options: object) -> int:
        model = build("Llama 3", torch.float32, max_position_embeddings=2048, **SDPA)
        apply_mst(model, mlp_chunks=8, lm_head_chunks=8, **options)
        with TensorBytes(model.parameters()) as held:
            own_loss(ids, ids)(model).backward()
        return held.peak

    assert peak(layer_chunks=8) < 0.75 * peak()


def test_evaluation_and_generation_are_as_before(batch):
    ids, _ = batch
    model = build("Llama 3", **SDPA).eval()

    def results() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits + 0
        return logits, model.generate(ids[:1, :9], max_new_tokens=8, do_sample=False)

    expected = results()
    apply_mst(model, **OPTIONS)
    logits, tokens = results()
    torch.testing.assert_close(logits, expected[0], rtol=1e-10, atol=1e-10)
    assert torch.equal(tokens, expected[1])


def test_attention_weights_are_still_returned_on_request(batch):
    ids, _ = batch
    model = build("Llama 3")
    expected = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    apply_mst(model, **OPTIONS, checkpoint_layers="none")
    got = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_hooks_on_norms_and_attention_see_real_tensors(batch):
    model, seen = build("Llama 3", **SDPA), {}
    for name in ("input_layernorm", "self_attn"):
        module = getattr(model.model.layers[0], name)

        def note(_module: nn.Module, _args: object, output: object, name: str = name) -> None:
            seen.setdefault(name, []).append(output[0] if isinstance(output, tuple) else output)

        module.register_forward_hook(note)
    loss = own_loss(*batch)
    expected = gradients(model, loss(model))
    before = {name: outputs[0].detach().clone() for name, outputs in seen.items()}
    seen.clear()
    apply_mst(model, **OPTIONS, checkpoint_layers="none")
    assert distance(gradients(model, loss(model)), expected) < 1e-10
    for name, output in before.items():
        assert type(seen[name][0]) is Tensor
        torch.testing.assert_close(seen[name][0], output, rtol=1e-10, atol=1e-10)


def test_copies_and_pickles_train_the_same_and_removal_gives_the_model_back(batch):
    model, loss = build("Llama 3", **SDPA), own_loss(*batch)
    expected = gradients(model, loss(model))
    handle = apply_mst(model, **OPTIONS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert distance(gradients(twin, loss(twin)), expected) < 1e-10
    handle.update(layer_chunks=None)
    assert not any(row.block in ("attention", "norm") for row in handle.rows)
    handle.remove()
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(model, loss(model)).items())


def test_the_table_names_each_part_and_why_another_shape_is_left():
    import transformers

    rows = apply_mst(build("Llama 3"), **OPTIONS).rows
    assert [row.name for row in rows if row.block == "attention"] == [f"model.layers.{i}.self_attn" for i in range(2)]
    norms = [row.name for row in rows if row.block == "norm"]
    assert norms == [
        *(f"model.layers.{i}.{name}" for i in range(2) for name in ("input_layernorm", "post_attention_layernorm")),
        "model.norm",
    ]
    config = transformers.AutoConfig.for_model("gptj", n_embd=48, n_head=4, n_layer=2, rotary_dim=8, vocab_size=VOCAB)
    rows = apply_mst(transformers.AutoModelForCausalLM.from_config(config), **OPTIONS).rows
    (reason,) = {row.reason for row in rows if row.block == "attention"}
    assert reason == "does not call its attention by transformers' interface"
    assert not any(row.block == "norm" for row in rows)
    assert any(row.block == "MLP" and row.rewritten for row in rows)


def test_an_encoders_output_reaches_the_decoders_cross_attention_whole():
    import transformers

    torch.manual_seed(0)
    sizes = {"d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(vocab_size=VOCAB, **sizes, **heads, dropout=0.0, attn_implementation="sdpa")
    model = transformers.BartForConditionalGeneration(config).double().train()
    ids, labels = torch.randint(4, VOCAB, (2, 33)), torch.randint(4, VOCAB, (2, 21))

    def loss() -> Tensor:
        logits = model(input_ids=ids, decoder_input_ids=labels, use_cache=False).logits
        return F.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1))

    expected = gradients(model, loss())
    apply_mst(model, **OPTIONS)
    assert furthest(gradients(model, loss()), expected) < 1e-10


def test_a_rotary_embedding_of_another_shape_is_refused_by_name(batch):
    model = build("Llama 3", **SDPA)
    apply_mst(model, **OPTIONS, checkpoint_layers="none")
    rotary = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda *args, **kwargs: tuple(t[0] for t in rotary(*args, **kwargs))
    with pytest.raises(TypeError, match=r"LlamaAttention runs in mini-sequences .* shape \(33, 12\). Set layer_chunks"):
        model(input_ids=batch[0], use_cache=False)


@pytest.mark.parametrize("value", [0, "many", 1.5, True])
def test_a_wrong_number_is_named(value):
    with pytest.raises(ValueError, match=f"layer_chunks={value!r}"):
        MSTConfig(layer_chunks=value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint_offload": "all"}, "checkpoint_offload='all' is not known"),
        ({"checkpoint_offload": "inputs", "checkpoint_layers": "none"}, "checkpoint_layers='none' checkpoints none"),
        ({"offload_fraction": 0.5}, "needs checkpoint_offload='inputs\\+attention'; got None"),
        ({"offload_fraction": 2, "checkpoint_offload": "inputs+attention"}, "offload_fraction=2 is not a fraction"),
        ({"offload_fraction": 0.5, "checkpoint_offload": "inputs+attention"}, "Set layer_chunks='auto' as well"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MSTConfig(**options)


def test_heads_fall_into_groups_only_where_a_group_keeps_a_device_busy():
    assert attention_module.head_groups(32, 8, 2**18) == 8
    assert attention_module.head_groups(32, 8, 2**13) == 4
    assert attention_module.head_groups(32, 8, 2**10) == 1
    assert attention_module.head_groups(32, 1, 2**18) == 1
    assert attention_module.head_groups(40, 10, 2**18) == 5
    assert attention_module.head_groups(32, 32, 2**18) == 8


assert BASE["num_hidden_layers"] == 2  # the table above counts on it
