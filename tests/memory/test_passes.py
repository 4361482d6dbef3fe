"""Matmuls of the MLPs, counted."""

from __future__ import annotations

import math

import pytest
from memory_tools import CONFIGS, causal_lm, causal_loss, token_batch
from torch import nn

from lightning_mst import MSTConfig
from lightning_mst.memory.passes import passes_of
from lightning_mst.memory.rehearsal import Step, new_fake_mode
from lightning_mst.rewrite.handle import apply_mst

KEPT = MSTConfig(None, None, "none")


def passes(family: str, config: MSTConfig, freeze: bool = False, **options: object) -> float:
    fake = new_fake_mode()
    with fake:
        model = causal_lm(family, **options)
    if freeze:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("mlp" not in name)
    if not config.asks_for_nothing:
        apply_mst(model, config)
    return passes_of(model, Step(token_batch(1, 103), causal_loss, lambda _: None), fake)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (KEPT, 3),
        (CONFIGS["recompute"], 11 / 3),
        (MSTConfig(3, None, "all"), 11 / 3),
        (MSTConfig(3, None, "none"), 11 / 3),
        (MSTConfig(None, None, 2), 10 / 3),
    ],
)
def test_a_gated_mlp_is_computed_once_and_its_first_two_matmuls_again(config, expected):
    assert passes("Llama", config) == pytest.approx(expected)


def test_frozen_weights_have_no_gradients_and_experts_count_as_well():
    assert passes("Llama", KEPT, freeze=True) == pytest.approx(2)
    assert passes("Mixtral", KEPT, num_local_experts=4) == pytest.approx(3)


def test_a_model_without_mlps_has_none():
    fake = new_fake_mode()
    with fake:
        model = nn.Linear(4, 4)
    assert math.isnan(
        passes_of(model, Step({"x": token_batch(1, 4)["labels"]}, lambda m, b: m.weight.sum(), None), fake)
    )
