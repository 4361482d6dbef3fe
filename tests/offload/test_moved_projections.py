"""A fraction of the tokens' projections on the host: exact, counted, and chosen by measuring."""

from __future__ import annotations

import pytest
import torch
from offload_models import KV_HEADS, LAYERS, build, distance, gradients, leaves_nothing, loss_of, offload_of, tokens
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_mst import apply_mst
from lightning_mst.rewrite import auto_fraction as auto_module

CHUNKS = 4
OPTIONS = {
    "mlp_chunks": 3,
    "lm_head_chunks": None,
    "layer_chunks": CHUNKS,
    "checkpoint_offload": "inputs+attention",
}


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])  # with norms of queries and keys, results are kept besides
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.6, 1.0])
def test_gradients_are_exact_with_any_fraction(family, fraction):
    model = build(family, **({"head_dim": 8} if family == "Qwen3" else {}))
    expected = gradients(model)
    handle = apply_mst(model, **OPTIONS, offload_fraction=fraction)
    with leaves_nothing(handle):
        for _ in range(2):
            assert distance(gradients(model), expected) < 1e-10
        both = gradients(model, lambda model: loss_of(model) + loss_of(model, input_ids=tokens(1, 50)))
    assert distance(both, gradients(model, lambda m: loss_of(m) + loss_of(m, input_ids=tokens(1, 50)))) < 1e-10


def with_dropout() -> nn.Module:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, lora_dropout=0.5
    )
    return peft.get_peft_model(build(), lora, autocast_adapter_dtype=False).train()


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_dropout_in_the_projections_draws_the_same_again(fraction):
    model = with_dropout()
    apply_mst(model, **OPTIONS)
    expected = gradients(model)
    apply_mst(model, **OPTIONS, offload_fraction=fraction)
    assert distance(gradients(model), expected) < 1e-10


def test_what_is_on_the_host_is_not_projected_again():
    model = build(hidden_size=64, num_key_value_heads=4)
    batch = tokens(2, 64)  # 4 chunks of 32 tokens

    def work(fraction: float) -> int:
        apply_mst(model, **OPTIONS, offload_fraction=fraction)
        with FlopCounterMode(display=False) as counter:
            loss_of(model, input_ids=batch).backward()
        model.zero_grad()
        return counter.get_total_flops()

    all_again = work(0.0)
    # Queries, keys, values and output: 4 matrices of 64 x 64 for each of 128 tokens in each of 3 layers.
    projections = 2 * 4 * 64 * 64 * 128 * LAYERS
    assert work(1.0) == all_again - projections // 4 * 3  # all but the last mini-sequence
    assert work(0.6) == all_again - projections // 2
    assert work(0.1) == all_again


def test_auto_measures_first_and_moves_what_it_has_time_for_then(monkeypatch):
    model = build()
    expected = gradients(model)
    handle = apply_mst(model, **OPTIONS, offload_fraction="auto")
    asked: list[dict[str, float]] = []

    def choose(**amounts: float) -> float:
        asked.append(amounts)
        return 0.5

    monkeypatch.setattr(auto_module, "largest_token_fraction", choose)
    with leaves_nothing(handle):
        memory = offload_of(handle).memory

        def step(length: int) -> tuple[dict[str, Tensor], int]:
            before: list[int] = []

            def loss(model: nn.Module) -> Tensor:
                result = loss_of(model, input_ids=tokens(2, length))
                before.append(memory.in_use)
                return result

            return gradients(model, loss), before[0]

        results = [step(length) for length in (33, 33, 50, 33, 50)]
        assert [used > results[0][1] for _, used in results] == [False, True, False, True, True]
        for grads, _ in (results[0], results[1], results[3]):
            assert distance(grads, expected) < 1e-10
    assert len(asked) == 2
    for amounts in asked:
        assert amounts["num_layers"] == LAYERS
        assert 1e6 < amounts["bytes_per_second"] < 1e12
        assert 1e-5 < amounts["layer_seconds"] < 10
        assert amounts["host_bytes"] > 2**20
    # Input, attention's output and log-sum-exp, each in the smallest slab; q, k, v and the output of 66 tokens.
    assert asked[0]["always_bytes"] == 3 * 2**16
    assert asked[0]["all_tokens_bytes"] == 66 * (32 + 2 * 8 * KV_HEADS + 32) * 8


def test_a_copy_is_timed():
    for size in (0, 2**22, 2**40):
        assert 1e8 < auto_module.copied_per_second(torch.device("cpu"), size) < 1e12
