"""apply_mst on models that nobody's table knows, its settings, its table and its errors."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from rewrite_models import (
    VOCAB,
    Attention,
    FeedForward,
    PlainTransformer,
    build,
    distance,
    gradients,
    multiply_adds,
    plain_loss,
)
from torch import nn

from lightning_mst import MSTConfig, apply_mst
from lightning_mst.ops.deferred_logits import DeferredLogits, DeferredLogitsWarning

OPTIONS = {"mlp_chunks": 4, "lm_head_chunks": 4}


def leftovers(model: nn.Module) -> list[str]:
    names = ("_mst", "forward", "gradient_checkpointing", "_gradient_checkpointing_func")
    return [f"{n}.{k}" for n, m in model.named_modules() for k in names if k in m.__dict__]


# --- exactness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpoint_layers", ["all", "none", [1]])
def test_a_transformer_written_by_hand_keeps_its_loss_and_gradients(tied, checkpoint_layers, batch):
    model = PlainTransformer(tied=tied).double()
    expected_loss = plain_loss(model, *batch)
    expected = gradients(model, expected_loss)
    apply_mst(model, checkpoint_layers=checkpoint_layers, **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeferredLogitsWarning)
        loss = plain_loss(model, *batch)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
    assert distance(gradients(model, loss), expected) < 1e-10


@pytest.mark.parametrize("seq", [1, 2, 3, 7, 33])
@pytest.mark.parametrize("chunks", [1, 2, 4, 64])
def test_every_length_and_number_of_chunks_is_exact(seq, chunks):
    model = PlainTransformer().double()
    ids = torch.randint(0, VOCAB, (3, seq))

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(ids).transpose(1, 2), ids)

    expected = gradients(model, loss())
    apply_mst(model, mlp_chunks=chunks, lm_head_chunks=chunks)
    assert distance(gradients(model, loss()), expected) < 1e-10


def test_all_labels_ignored_gives_what_the_unmodified_model_gives_and_keeps_a_graph(batch):
    model = PlainTransformer().double()
    labels = torch.full_like(batch[0], -100)
    expected = gradients(model, plain_loss(model, batch[0], labels))
    apply_mst(model, **OPTIONS)
    loss = plain_loss(model, batch[0], labels)
    assert loss.isnan()
    assert loss.requires_grad
    got = gradients(model, loss)
    assert got.keys() == expected.keys()
    assert all(not g.isnan().any() and torch.equal(g, expected[n]) for n, g in got.items())


@pytest.mark.parametrize("frozen", ["unembed", "blocks", "embed", "ff"])
def test_frozen_parts_get_no_gradient_and_the_rest_stays_exact(frozen, batch):
    model = PlainTransformer().double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    expected = gradients(model, plain_loss(model, *batch))
    apply_mst(model, **OPTIONS)
    assert distance(gradients(model, plain_loss(model, *batch)), expected) < 1e-10


def test_a_frozen_trunk_still_trains_the_mlps_and_the_head(batch):
    model = PlainTransformer().double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("ff.down" in name or "unembed" in name)
    expected = gradients(model, plain_loss(model, *batch))
    apply_mst(model, **OPTIONS)
    assert distance(gradients(model, plain_loss(model, *batch)), expected) < 1e-10


@pytest.mark.parametrize("tied", [False, True])
def test_loss_scale_accumulation_and_repeated_backward_are_exact(tied, batch):
    ids, labels = batch
    model = PlainTransformer(tied=tied).double()

    def run() -> list[dict[str, torch.Tensor]]:
        results = []
        results.append(gradients(model, plain_loss(model, ids, labels) * 8))
        model.zero_grad(set_to_none=True)
        for step in range(4):
            (plain_loss(model, ids.roll(step, 1), labels.roll(step, 1)) / 4).backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters()})
        model.zero_grad(set_to_none=True)
        loss = plain_loss(model, ids, labels)
        loss.backward(retain_graph=True)
        loss.backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters()})
        model.zero_grad(set_to_none=True)
        first, second = plain_loss(model, ids, labels), plain_loss(model, ids[:, :9], labels[:, :9])
        (first + 3 * second).backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters()})
        return results

    expected = run()
    apply_mst(model, **OPTIONS)
    for got, reference in zip(run(), expected, strict=True):
        assert distance(got, reference) < 1e-10


def test_dropout_inside_the_mlp_is_the_same_in_both_passes(batch):
    """With and without checkpointing of the layer, the same seed must give the same gradients."""
    results = []
    for checkpoint_layers in ("none", "all"):
        torch.manual_seed(0)
        model = PlainTransformer(dropout=0.5).double().train()
        apply_mst(model, checkpoint_layers=checkpoint_layers, **OPTIONS)
        torch.manual_seed(1)
        results.append(gradients(model, plain_loss(model, *batch)))
    assert distance(*results) < 1e-12
    # And against finite differences of the loss with the masks of the same seed, which know nothing of our backward.
    model = PlainTransformer(dropout=0.5).double().train()
    apply_mst(model, **OPTIONS)

    def loss() -> torch.Tensor:
        torch.manual_seed(2)
        return plain_loss(model, *batch)

    grads = gradients(model, loss())
    name, weight = "blocks.1.ff.up.weight", model.blocks[1].ff.up.weight
    direction = torch.randn_like(weight)
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            weight.add_(direction, alpha=step)
            values.append(loss().item())
    slope = (values[0] - values[1]) / 2e-5
    assert slope == pytest.approx((grads[name] * direction).sum().item(), rel=1e-5)


def test_every_parameters_gradient_is_delivered_once_per_backward(batch):
    model = PlainTransformer(tied=True)
    apply_mst(model, **OPTIONS)
    calls: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.update({name: calls.get(name, 0) + 1}))
    plain_loss(model, *batch).backward()
    assert calls == {name: 1 for name, _ in model.named_parameters()}


def test_an_optimizer_step_in_the_backward_pass_equals_one_after_it(batch):
    models = [PlainTransformer(), PlainTransformer()]
    models[1].load_state_dict(models[0].state_dict())
    apply_mst(models[0], **OPTIONS)
    for parameter in models[0].parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    plain_loss(models[0], *batch).backward()
    after = torch.optim.SGD(models[1].parameters(), lr=0.1)
    plain_loss(models[1], *batch).backward()
    after.step()
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(parameter, models[1].get_parameter(name), rtol=1e-5, atol=1e-6)


# --- logits --------------------------------------------------------------------------------------------------------


def test_whoever_asks_for_real_logits_gets_them_with_one_warning_that_names_who(batch):
    model = build("Llama 3").eval()
    expected = model(input_ids=batch[0], use_cache=False).logits
    apply_mst(model, **OPTIONS)
    logits = model(input_ids=batch[0], use_cache=False).logits
    assert isinstance(logits, DeferredLogits)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(logits.cumsum(-1), expected.cumsum(-1))
        logits.cumsum(-1)
    (warning,) = caught
    assert warning.category is DeferredLogitsWarning
    assert "cumsum needs the real logits" in str(warning.message)


def test_the_auto_head_answers_short_inputs_with_plain_logits(batch):
    model = build("Llama 3")
    apply_mst(model)
    assert type(model(input_ids=batch[0], use_cache=False).logits) is torch.Tensor


def test_a_loss_under_no_grad_runs_in_mini_sequences_too(batch):
    model = PlainTransformer()
    apply_mst(model, **OPTIONS)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error", DeferredLogitsWarning)
        loss = plain_loss(model, *batch)
    assert not loss.requires_grad
    assert multiply_adds(model, lambda: plain_loss(model, *batch), VOCAB) > 0


def test_labels_out_of_range_or_of_the_wrong_shape_stop_with_a_clear_message(batch):
    model = PlainTransformer()
    apply_mst(model, **OPTIONS)
    logits = model(batch[0]).view(-1, VOCAB)
    labels = batch[0].reshape(-1).clone()
    labels[3] = VOCAB
    with pytest.raises(IndexError, match=rf"Label {VOCAB} is out of range.*0 to {VOCAB - 1}"):
        F.cross_entropy(logits, labels)
    with pytest.raises(ValueError, match=r"shape \(66,\).*got \(65,\)"):
        F.cross_entropy(logits, labels[1:])


def test_a_forward_hook_that_changes_the_heads_answer_is_told_so(batch):
    model = PlainTransformer()
    apply_mst(model, **OPTIONS)
    model.unembed.register_forward_hook(lambda _module, _args, out: (*out, out) if isinstance(out, tuple) else None)
    with pytest.raises(RuntimeError, match="forward hook of the LM head"):
        plain_loss(model, *batch)


# --- settings ------------------------------------------------------------------------------------------------------


def test_applying_twice_is_applying_once_and_other_settings_replace_the_first(batch):
    model = PlainTransformer().double()
    expected = gradients(model, plain_loss(model, *batch))
    apply_mst(model, **OPTIONS)
    handle = apply_mst(model, mlp_chunks=2, lm_head_chunks=None, checkpoint_layers="none")
    assert distance(gradients(model, plain_loss(model, *batch)), expected) < 1e-10
    assert {row.form for row in handle.rows} == {"M = 2"}
    assert type(model(batch[0])) is torch.Tensor
    handle.remove()
    assert leftovers(model) == []


def test_update_changes_some_settings_and_keeps_the_others(batch):
    model = PlainTransformer()
    handle = apply_mst(model, **OPTIONS)
    assert handle.update(mlp_chunks=8) is handle
    assert handle.config == MSTConfig(mlp_chunks=8, lm_head_chunks=4)
    assert {row.form for row in handle.rows if row.block == "MLP"} == {"M = 8"}


def test_a_failed_update_keeps_the_form_that_the_model_had(batch):
    model = PlainTransformer().double()
    handle = apply_mst(model, **OPTIONS)
    with pytest.raises(ValueError, match="matches no module"):
        handle.update(mlp_modules="*.nothing")
    assert handle.config == MSTConfig(**OPTIONS)
    assert isinstance(model(batch[0]), DeferredLogits)


def test_a_failed_second_apply_keeps_the_form_of_the_first(batch):
    model = PlainTransformer()
    apply_mst(model, **OPTIONS)
    with pytest.raises(ValueError, match="matches no module"):
        apply_mst(model, mlp_modules="*.nothing")
    assert isinstance(model(batch[0]), DeferredLogits)


def test_the_table_after_an_update_knows_what_the_layers_were_before_the_rewrite():
    model = build("Llama 3")
    handle = apply_mst(model, **OPTIONS).update(checkpoint_layers=2)
    assert [row.form for row in handle.rows if row.block == "layer"] == ["checkpointed", "as it was"]


def test_remove_restores_settings_that_were_there_before(batch):
    model = build("Llama 3")
    model.activation_checkpointing_enable() if hasattr(
        model, "activation_checkpointing_enable"
    ) else model.gradient_checkpointing_enable()
    own_forward = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = own_forward
    before = [dict(m.__dict__) for m in model.modules()]
    handle = apply_mst(model, checkpoint_layers=2, **OPTIONS)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False]
    handle.remove()
    assert [dict(m.__dict__) for m in model.modules()] == before
    assert handle.config is None


@pytest.mark.parametrize(
    ("setting", "chosen"), [("all", [0, 1, 2]), ("none", []), (2, [0, 2]), (5, [0]), ([1], [1]), ([2, 0], [0, 2])]
)
def test_checkpoint_layers_chooses_which_layers_are_recomputed(setting, chosen, batch):
    model = PlainTransformer(layers=3)
    runs = [0, 0, 0]
    for index, block in enumerate(model.blocks):
        block.attn.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    apply_mst(model, checkpoint_layers=setting, mlp_chunks=None)
    plain_loss(model, *batch).backward()
    assert runs == [2 if index in chosen else 1 for index in range(3)]


def test_checkpointing_is_off_in_eval_mode_as_in_transformers(batch):
    model = PlainTransformer().eval()
    apply_mst(model)
    runs = []
    model.blocks[0].attn.register_forward_hook(lambda *_: runs.append(1))
    plain_loss(model, *batch).backward()
    assert len(runs) == 1


def test_patterns_overrule_discovery(batch):
    model = PlainTransformer()
    handle = apply_mst(model, mlp_chunks=4, mlp_modules=["blocks.0.ff", "blocks.2.*ff"], lm_head_module="un*")
    assert [row.name for row in handle.rows if row.block == "MLP"] == ["blocks.0.ff", "blocks.2.ff"]
    assert [row.name for row in handle.rows if row.block == "LM head"] == ["unembed"]


def test_with_everything_off_nothing_is_touched():
    model = PlainTransformer()
    handle = apply_mst(model, mlp_chunks=None, lm_head_chunks=None, checkpoint_layers="none")
    assert handle.rows == []
    assert leftovers(model) == []


def test_the_table_says_what_was_rewritten_and_what_was_not_and_why():
    class Mixer(nn.Module):
        """Shaped like an MLP, but looks at its neighbours."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(48, 96), nn.Linear(96, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(x + x.roll(1, dims=-2))))

    model = PlainTransformer()
    model.blocks[1].mixer = Mixer()
    text = str(apply_mst(model, **OPTIONS))
    assert "3 x blocks.*.ff" in text
    assert "FeedForward" in text
    assert "M = 4" in text
    assert "checkpointed" in text
    assert "as it was" in text
    assert "mixes tokens" in text


# --- discovery -----------------------------------------------------------------------------------------------------


def test_the_hidden_size_tells_an_up_from_a_down_projection():
    """GPT-2's MLP and its mirror image (I -> D -> I) have the same linear layers."""
    handle = apply_mst(build("GPT-2"), **OPTIONS)
    assert [row.form for row in handle.rows if row.block == "MLP"] == ["M = 4", "M = 4"]


def test_attention_of_a_single_argument_is_not_taken_for_an_mlp():
    class Odd(Attention):
        """Grouped so that its projections have the shapes of a fused gated MLP."""

        def __init__(self) -> None:
            super().__init__(48)
            self.qkv = nn.Linear(48, 96)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, kv = self.qkv(x).split([48, 48], dim=-1)
            return self.out(F.scaled_dot_product_attention(q, kv, kv, is_causal=True))

    Odd.__name__ = "SequenceBlock"
    model = PlainTransformer()
    for block in model.blocks:
        block.mix = Odd()
    handle = apply_mst(model, **OPTIONS)
    reasons = {row.name: row.reason for row in handle.rows if row.block == "MLP"}
    assert "mixes tokens" in reasons["blocks.0.mix"]
    assert reasons["blocks.0.ff"] == ""


def test_a_mixer_is_found_out_even_when_its_last_weights_start_as_zeros():
    class Zeroed(FeedForward):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(F.gelu(self.up(x)).cumsum(-2))

    model = PlainTransformer()
    for block in model.blocks:
        block.ff = Zeroed(48, 96)
        nn.init.zeros_(block.ff.down.weight)
        nn.init.zeros_(block.ff.down.bias)
    handle = apply_mst(model, **OPTIONS)
    assert all("mixes tokens" in row.reason for row in handle.rows if row.block == "MLP")


def test_the_probe_leaves_modes_and_random_numbers_as_they_were():
    model = PlainTransformer(dropout=0.1).train()
    model.blocks[0].ff.dropout.eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    apply_mst(model, **OPTIONS)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_on_the_meta_device_is_rewritten_by_its_structure():
    with torch.device("meta"):
        model = PlainTransformer()
    rows = apply_mst(model, **OPTIONS).rows
    assert sum(row.form == "M = 4" for row in rows) == 4


def test_blocks_in_a_sequential_are_layers_too(batch):
    model = PlainTransformer().double()
    model.blocks = nn.Sequential(*model.blocks)
    expected = gradients(model, plain_loss(model, *batch))
    handle = apply_mst(model, **OPTIONS)
    assert sum(row.form == "checkpointed" for row in handle.rows) == 3
    assert distance(gradients(model, plain_loss(model, *batch)), expected) < 1e-10


def test_a_model_inside_another_module_is_found(batch):
    wrapper = nn.Module()
    wrapper.inner = build("Qwen2")
    names = [row.name for row in apply_mst(wrapper, **OPTIONS).rows]
    assert "inner.model.layers.0.mlp" in names
    assert "inner.lm_head" in names


def test_plain_models_survive_deepcopy_and_pickle(batch):
    model = PlainTransformer().double()
    expected = gradients(model, plain_loss(model, *batch))
    apply_mst(model, **OPTIONS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin(batch[0]), DeferredLogits)
        assert distance(gradients(twin, plain_loss(twin, *batch)), expected) < 1e-10


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_chunks": 0}, r"mlp_chunks=0.*at least 1"),
        ({"mlp_chunks": -3}, "mlp_chunks=-3"),
        ({"lm_head_chunks": 2.5}, r"lm_head_chunks=2\.5"),
        ({"lm_head_chunks": True}, "lm_head_chunks=True"),
        ({"mlp_chunks": "papre"}, r"'papre'.*'auto'.*'paper'"),
        ({"checkpoint_layers": 0}, "checkpoint_layers=0"),
        ({"checkpoint_layers": "some"}, r"'some'.*'all', 'none'"),
        ({"checkpoint_layers": [0, 0]}, "different layer indices"),
        ({"checkpoint_layers": []}, "checkpoint_layers"),
        ({"checkpoint_layers": [7]}, r"layer 7.*3 layers: 0 to 2"),
        ({"mlp_modules": "*.mlp"}, r"'\*.mlp' matches no module.*blocks.\*.ff"),
        ({"mlp_modules": []}, "mlp_modules"),
        ({"mlp_modules": "*.ff", "mlp_chunks": None}, "mlp_chunks=None"),
        ({"mlp_modules": "*.attn"}, r"blocks.0.attn.*mixes tokens"),
        ({"lm_head_module": "blocks.*"}, r"blocks.0.*mixes tokens.*lm_head_module"),
        ({"lm_head_module": "norm"}, "LayerNorm.*holds no linear layer"),
        ({"lm_head_module": "head"}, "'head' matches no module"),
    ],
)
def test_a_wrong_setting_stops_with_what_was_got_and_what_was_expected(options, message):
    model = PlainTransformer(layers=3)
    with pytest.raises(ValueError, match=message):
        apply_mst(model, **options)
    assert leftovers(model) == []


def test_an_unknown_option_names_the_known_ones():
    with pytest.raises(TypeError, match=r"'mlp_chunk'.*mlp_chunks, lm_head_chunks"):
        apply_mst(PlainTransformer(), mlp_chunk=4)


def test_something_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"nn\.Module; got list"):
        apply_mst([PlainTransformer()])


def test_rewriting_nothing_is_an_error_that_says_what_was_looked_for():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r"Nothing to rewrite in Sequential.*MLP:.*LM head:.*mlp_modules"):
        apply_mst(model)


def test_checkpointing_alone_needs_layers():
    with pytest.raises(ValueError, match="no repeated layers"):
        apply_mst(nn.Linear(2, 2), mlp_chunks=None, lm_head_chunks=None)


def test_every_head_of_a_model_that_predicts_several_tokens_is_rewritten(batch):
    ids, labels = batch
    model = PlainTransformer().double()
    model.second = nn.Linear(48, VOCAB).double()

    def loss() -> torch.Tensor:
        hidden = []
        with_hook = model.norm.register_forward_hook(lambda _m, _a, output: hidden.append(output))
        logits = model(ids)
        with_hook.remove()
        next_but_one = model.second(hidden[0])
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)) + F.cross_entropy(
            next_but_one[:, :-2].reshape(-1, VOCAB), labels[:, 2:].reshape(-1)
        )

    expected = gradients(model, loss())
    rows = [row for row in apply_mst(model, **OPTIONS).rows if row.block == "LM head"]
    assert [(row.name, row.form) for row in rows] == [("unembed", "M = 4"), ("second", "M = 4")]
    assert isinstance(model(ids), DeferredLogits)
    assert distance(gradients(model, loss()), expected) < 1e-10
