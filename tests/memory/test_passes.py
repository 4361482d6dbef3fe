"""Matmuls of the MLPs, counted."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
from memory_tools import CONFIGS, causal_lm, causal_loss, token_batch
from torch import nn

from lightning_mst import MSTConfig
from lightning_mst.memory.passes import Passes, passes_of
from lightning_mst.memory.rehearsal import Step, new_fake_mode
from lightning_mst.rewrite.handle import apply_mst

KEPT = MSTConfig(None, None, "none")


def passes(family: str, config: MSTConfig, freeze: bool = False, **options: object) -> Passes:
    fake = new_fake_mode()
    with fake:
        model = causal_lm(family, **options)
    if freeze:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("mlp" not in name)
    if not config.asks_for_nothing:
        apply_mst(model, config)
    return passes_of(model, Step(token_batch(1, 27), causal_loss, lambda _: None), fake)


@pytest.mark.parametrize(
    ("config", "mlp", "projection", "attention"),
    [
        (KEPT, 3, 3, 3.5),
        (CONFIGS["recompute"], 11 / 3, 4, 4.5),
        (MSTConfig(3, 3, "all"), 11 / 3, 4, 4.5),
        (MSTConfig(3, None, "none"), 11 / 3, 3, 3.5),
        (MSTConfig(None, None, 2), 10 / 3, 3.5, 4),
        (MSTConfig(3, 3, "all", layer_chunks=3), 11 / 3, 4, 4.5),
        (MSTConfig(3, 3, "all", layer_chunks=3, checkpoint_offload="inputs"), 11 / 3, 4, 4.5),
        (MSTConfig(3, 3, "all", layer_chunks=3, checkpoint_offload="inputs+attention"), 11 / 3, 4, 3.5),
    ],
)
def test_what_is_recomputed_costs_one_more_pass_and_the_last_matmul_of_an_mlp_is_not(
    config, mlp, projection, attention
):
    counted = passes("Llama", config)
    assert counted.mlp == pytest.approx(mlp)
    assert counted.projection == pytest.approx(projection)
    assert counted.attention == pytest.approx(attention)
    assert counted.lm_head == pytest.approx(3)


def test_frozen_weights_have_no_gradients_and_experts_count_as_well():
    frozen = passes("Llama", KEPT, freeze=True)
    assert (frozen.mlp, frozen.projection) == (pytest.approx(2), pytest.approx(3))
    assert passes("Mixtral", KEPT, num_local_experts=4).mlp == pytest.approx(3)


def test_a_model_without_a_part_has_no_passes_of_it():
    fake = new_fake_mode()
    with fake:
        model = nn.Linear(4, 4)
    counted = passes_of(model, Step({"x": token_batch(1, 4)["labels"]}, lambda m, b: m.weight.sum(), None), fake)
    assert all(map(math.isnan, astuple(counted)))
