"""Where in a step a program is."""

from __future__ import annotations

import torch
from memory_tools import CONFIGS, adamw, causal_lm, causal_loss, rehearsed_step, token_batch

from lightning_mst import OptimizerInBackward
from lightning_mst.memory.places import Place, blocks_of


def test_every_block_of_a_layer_and_what_has_weights_outside_of_layers_is_a_place():
    names = set(blocks_of(causal_lm(num_hidden_layers=1)).values())
    layer = "model.layers.0"
    assert {(layer, ""), (layer, "mlp"), (layer, "self_attn"), ("", "lm_head"), ("", "model.embed_tokens")} <= names


def test_a_step_passes_through_its_places_in_order():
    held = rehearsed_step(
        causal_lm(num_hidden_layers=2), token_batch(1, 64), causal_loss, adamw, CONFIGS["M=3,5"], record=True
    )
    order = list(dict.fromkeys(str(event.place) for event in held.events))
    passed = [order.index(f"forward of model.layers.{i}, mlp") for i in (0, 1)]
    passed.append(order.index("forward of lm_head"))
    passed += [order.index(f"backward of model.layers.{i}, mlp") for i in (1, 0)]
    assert passed == sorted(passed)


def in_backward(model):
    # In single steps, which leave temporaries to be seen.
    return OptimizerInBackward(model.parameters(), torch.optim.AdamW, lr=1e-3, foreach=False)


def test_a_step_of_an_optimizer_in_the_backward_pass_is_noticed():
    held = rehearsed_step(
        causal_lm(num_hidden_layers=2), token_batch(1, 64), causal_loss, in_backward, CONFIGS["off"], record=True
    )
    phases = [event.place.phase for event in held.events]
    assert "backward" in phases[phases.index("optimizer") :]


def test_places_have_readable_names():
    assert str(Place("backward", "model.layers.3", "mlp")) == "backward of model.layers.3, mlp"
    assert str(Place("forward", "", "")) == "forward of the loss"
    assert str(Place("optimizer", "", "")) == "optimizer step"
