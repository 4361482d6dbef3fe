"""``auto`` does what the planner, asked about every alternative, says is best."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import LlamaConfig

from lightning_mst import MSTConfig, OptimizerInBackward, apply_mst
from lightning_mst.memory import settle
from lightning_mst.memory.auto_layers import RESERVE, Room, fewest_layers, first_that_fits
from lightning_mst.memory.prediction import KINDS, Prediction
from lightning_mst.memory.setting import Setting, Training
from lightning_mst.models import from_config
from lightning_mst.rewrite.costs import mlp_cost

# Llama-3-8B's layers, two of them.
LAYERS = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA = LlamaConfig(**LAYERS, num_hidden_layers=2, vocab_size=128256, tie_word_embeddings=False)
SMALL = LlamaConfig(hidden_size=64, intermediate_size=256, num_attention_heads=4, num_hidden_layers=8, vocab_size=1000)


def adamw_in_backward(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return OptimizerInBackward(trained, torch.optim.AdamW, lr=1e-3, fused=True)


def freeze_layers(model):
    for parameter in model.model.layers.parameters():
        parameter.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def setting():
    return Setting(partial(from_config, LLAMA), Training("bf16-true", adamw_in_backward))


@pytest.mark.parametrize("checkpoint_layers", ["all", "none"])
@pytest.mark.parametrize("sequence_length", [2048, 8192, 65536])
def test_no_number_of_mini_sequences_beats_auto_in_memory(setting, sequence_length, checkpoint_layers):
    """Within 1 %, and never splitting an MLP into pieces of fewer than D tokens, or the head into fewer than D / 4."""

    def total(mlp, head):
        return setting.predict(MSTConfig(mlp, head, checkpoint_layers), sequence_length).total

    mlps = [m for m in (1, 2, 16) if m == 1 or sequence_length / m >= LLAMA.hidden_size]
    heads = [m for m in (1, 64) if m == 1 or sequence_length / m >= LLAMA.hidden_size / 4]
    alternatives = {(m, "auto"): total(m, "auto") for m in mlps} | {("auto", m): total("auto", m) for m in heads}
    assert total("auto", "auto") <= 1.01 * min(alternatives.values()), alternatives


def test_auto_leaves_blocks_whole_where_splitting_them_would_cost_memory(setting):
    whole, split = (setting.predict(MSTConfig(m, m), 2048).total for m in (1, 4))
    assert setting.predict(MSTConfig(), 2048).total == whole < split


def test_auto_splits_frozen_mlps_sooner_as_their_gradients_need_no_sums():
    frozen = Setting(partial(from_config, LLAMA), Training("bf16-true", adamw_in_backward, prepare=freeze_layers))
    trained = Setting(partial(from_config, LLAMA), Training("bf16-true", adamw_in_backward))
    costs = [mlp_cost(s.model.model.layers[0].mlp, 4096) for s in (frozen, trained)]
    # What a gated MLP keeps are four vectors of I entries per token, of which the last is for a weight's gradient.
    assert [cost.per_token for cost in costs] == [3 * 14336 * 2, 4 * 14336 * 2]
    # Three sums in fp32 in place of three gradients in bf16, and one gradient beside them.
    assert [cost.per_split for cost in costs] == [0, 4096 * 14336 * (3 * 4 - 3 * 2 + 2)]


def test_memory_does_not_jump_down_where_auto_begins_to_split(setting):
    config = MSTConfig(checkpoint_layers="none")
    totals = [setting.predict(config, length).total for length in (4096, 8192, 12288)]
    assert totals == sorted(totals)


def predictor(per_layer, rest, saved):
    """A step of 12 layers, of which checkpointing one saves something."""

    def predict(config):
        chosen = config.checkpoint_layers
        count = {"all": 12, "none": 0}[chosen] if isinstance(chosen, str) else len(chosen)
        size = rest + 12 * per_layer - count * saved
        return Prediction(dict.fromkeys(KINDS, 0) | {"activations_kept": size}, "backward", "layer 11")

    return predict


@pytest.mark.parametrize("count", range(13))
def test_as_few_layers_are_checkpointed_as_fit_and_they_are_the_first(count):
    predict = predictor(per_layer=100, rest=1000, saved=90)
    needed = 1000 + 12 * 100 - count * 90
    config, prediction = fewest_layers(
        MSTConfig(checkpoint_layers="auto"), predict, num_layers=12, room=Room(int(needed / (1 - RESERVE)) + 2, 0)
    )
    assert config.checkpoint_layers == {0: "none", 12: "all"}.get(count, list(range(count)))
    assert prediction.total == needed


def test_a_step_that_does_not_fit_with_all_layers_checkpointed_has_no_config():
    config, prediction = fewest_layers(
        MSTConfig(checkpoint_layers="auto"), predictor(100, 1000, 90), num_layers=12, room=Room(1000, 0)
    )
    assert config is None
    assert prediction.total == 1000 + 120


def ladder_predictor(config):
    """A step of 12 layers: whole layers in mini-sequences save 500, inputs on the host 10 for each checkpointed one."""
    chosen = config.checkpoint_layers
    count = {"all": 12, "none": 0}[chosen] if isinstance(chosen, str) else len(chosen)
    size = 2000 + 100 * (12 - count) - 500 * (config.layer_chunks is not None)
    host = 10 * count if config.checkpoint_offload else 0
    return Prediction(
        dict.fromkeys(KINDS, 0) | {"activations_kept": size + 10 * count - host}, "backward", "layer 11", host
    )


@pytest.mark.parametrize(
    ("allowed", "host", "given", "expected"),
    [
        (3200, 0, {}, ("none", None, None)),
        (2120, 0, {}, ("all", None, None)),
        (2119, 0, {}, (list(range(7)), "auto", None)),
        (2119, 0, {"layer_chunks": 4}, (list(range(7)), 4, None)),
        (1620, 0, {}, ("all", "auto", None)),
        (1600, 120, {}, (list(range(11)), "auto", "inputs")),
        (1550, 120, {}, ("all", "auto", "inputs")),
        (1550, 119, {}, None),
        (1499, 999, {}, None),
        (3200, 0, {"checkpoint_offload": "inputs"}, ("none", None, None)),
        (2100, 999, {"checkpoint_offload": "inputs+attention"}, (list(range(11)), None, "inputs+attention")),
    ],
)
def test_layers_go_into_mini_sequences_and_to_the_host_only_where_checkpointing_them_is_not_enough(
    allowed, host, given, expected
):
    room = Room(int(allowed / (1 - RESERVE)) + 1, host)
    settled = first_that_fits(MSTConfig(checkpoint_layers="auto", **given), ladder_predictor, num_layers=12, room=room)
    config = settled.config
    if expected is None:
        assert config is None
        assert "Even with layers' inputs on the host (checkpoint_offload='inputs')" in settled.in_words()
    else:
        assert (config.checkpoint_layers, config.layer_chunks, config.checkpoint_offload) == expected


def test_what_was_chosen_comes_with_what_was_not_enough():
    room = Room(int(1621 / (1 - RESERVE)) * 2**20, 0)

    def predict(config):
        prediction = ladder_predictor(config)
        return Prediction({kind: n * 2**20 for kind, n in prediction.kinds.items()}, "backward", "layer 11")

    settled = first_that_fits(MSTConfig(checkpoint_layers="auto"), predict, num_layers=12, room=room)
    assert settled.in_words() == (
        "Not enough: all layers checkpointed (2.07 GiB). Chosen: layers wholly in mini-sequences "
        "(layer_chunks='auto'). A step is predicted to take 1.58 GiB of 1.63 GiB."
    )


def test_settling_finds_the_fewest_layers_of_a_model_and_leaves_the_model_alone():
    model = from_config(SMALL)
    setting = Setting(model, Training("32-true", adamw_in_backward, device="cpu"))

    def total(layers):
        return setting.predict(MSTConfig(checkpoint_layers=layers), 4096).total

    budget = int(total(list(range(5))) / (1 - RESERVE)) + 2
    config = MSTConfig.for_memory(budget, sequence_length=4096)
    settled = settle(config, model, optimizer=adamw_in_backward, device="cpu")
    assert settled.checkpoint_layers == [0, 1, 2, 3, 4]
    assert total([0, 1, 2, 3]) > budget * (1 - RESERVE)
    handle = apply_mst(model, settled)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True] * 5 + [False] * 3
    handle.remove()
    with pytest.raises(
        ValueError,
        match=r"Even with layers' inputs on the host .*and [\d.]+ MiB of the host \(peak in .*adamw_cpu_offload",
    ):
        settle(MSTConfig.for_memory("1MiB", sequence_length=128), model, optimizer=adamw_in_backward, device="cpu")


def test_backward_is_done_with_the_layers_that_keep_their_activations_before_it_comes_to_the_checkpointed_ones():
    setting = Setting(partial(from_config, SMALL), Training("32-true", adamw_in_backward, device="cpu"))
    first, last, spread = (
        setting.predict(MSTConfig(checkpoint_layers=layers), 4096).total for layers in ([0, 1, 2, 3], [4, 5, 6, 7], 2)
    )
    assert first <= min(last, spread)


def test_auto_layers_are_refused_where_nothing_is_known_of_the_step():
    model = from_config(SMALL)
    with pytest.raises(ValueError, match=r"depends on the training step.*memory\.settle"):
        apply_mst(model, checkpoint_layers="auto")
    with pytest.raises(ValueError, match=r"device's memory and the length.*for_memory"):
        settle(MSTConfig(checkpoint_layers="auto"), model)
    assert settle(MSTConfig(), model) == MSTConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_memory": "80 gigs", "checkpoint_layers": "auto"}, "'80 gigs' is not an amount of memory"),
        ({"device_memory": "80GiB"}, "is for checkpoint_layers='auto'"),
        ({"sequence_length": 1}, "sequence_length=1 is not a whole number of at least 2"),
        ({"batch_size": 0}, "batch_size=0 is not a whole number of at least 1"),
    ],
)
def test_wrong_sizes_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        MSTConfig(**options)
