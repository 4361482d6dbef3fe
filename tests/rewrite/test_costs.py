"""What the rewrite saves, for one model of every kind: matmuls counted, bytes counted.

Adapters and quantized weights have their counts in ``test_adapters.py`` and ``test_quantized.py``.
"""

from __future__ import annotations

import pytest
import torch
from families import VOCAB, build
from rewrite_models import MatmulCounter
from torch import nn

from lightning_mst import apply_mst
from lightning_mst.memory import TensorBytes

TOKENS, INNER = 256, 1024
ONE_ACTIVATION = TOKENS * INNER * 4  # bytes in fp32
KINDS = {
    "gated": "llama",
    "a norm after the MLP": "olmo2",
    "soft-caps and a norm after the MLP": "gemma2",
    "experts": "mixtral",
    "two projections in the layer": "opt",
    "attention and MLP side by side": "gpt_neox",
    "a residual as second argument": "bloom",
    "a method of the layer": "bert",
}


def make(kind: str) -> nn.Module:
    sizes = {
        "intermediate_size": INNER, "ffn_dim": INNER, "hidden_size": 64, "attn_implementation": "sdpa",
        "max_position_embeddings": TOKENS,
    }  # fmt: skip
    if KINDS[kind] == "mixtral":
        # Or the gradients of so many experts hide what few tokens hold.
        sizes |= {"num_local_experts": 2, "num_experts": 2}
    if KINDS[kind] == "bloom":
        sizes = {"hidden_size": INNER // 4, "attn_implementation": "eager"}  # its I is 4 D
    if KINDS[kind] == "gemma2":
        sizes["attn_implementation"] = "eager"
    return build(KINDS[kind], **sizes)


def cost(model: nn.Module, ids: torch.Tensor) -> tuple[float, int, int]:
    """Multiply-adds of the MLPs, bytes alive between the passes, and bytes at the peak, of one step."""
    with MatmulCounter(INNER, 2 * INNER) as counter, TensorBytes([*model.parameters(), *model.buffers()]) as held:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        saved = held.live
        loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.total, saved, held.peak


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpointed_step_runs_the_mlp_at_most_four_times_and_its_peak_falls(kind):
    model = make(kind)
    ids = torch.randint(3, VOCAB, (1, TOKENS))
    unmodified, _, _ = cost(model, ids)
    apply_mst(model, mlp_chunks=None, lm_head_chunks=4)
    _, _, plain_peak = cost(model, ids)
    apply_mst(model, mlp_chunks=8, lm_head_chunks=4)
    ours, _, peak = cost(model, ids)
    assert ours <= unmodified * 4 / 3
    assert peak <= plain_peak - ONE_ACTIVATION


@pytest.mark.parametrize("kind", KINDS)
def test_without_checkpointing_nothing_of_the_mlps_inner_width_is_kept(kind):
    model = make(kind)
    ids = torch.randint(3, VOCAB, (1, TOKENS))
    apply_mst(model, mlp_chunks=None, lm_head_chunks=4, checkpoint_layers="none")
    _, whole, _ = cost(model, ids)
    apply_mst(model, mlp_chunks=8, lm_head_chunks=4, checkpoint_layers="none")
    _, saved, _ = cost(model, ids)
    layers = 2
    assert saved <= whole - layers * ONE_ACTIVATION


@pytest.mark.parametrize(
    "kind", ["gated", "a norm after the MLP", "two projections in the layer", "a method of the layer"]
)
def test_auto_recomputes_what_is_too_short_to_split_where_its_layer_keeps_its_activations(kind):
    tokens = 1024
    model = build(KINDS[kind], intermediate_size=INNER, ffn_dim=INNER, hidden_size=64, max_position_embeddings=tokens)
    ids = torch.randint(3, VOCAB, (1, tokens))

    def step(**settings: object) -> tuple[int, dict[str, torch.Tensor]]:
        handle = apply_mst(model, lm_head_chunks=4, **settings)
        with TensorBytes([*model.parameters(), *model.buffers()]) as held:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            saved = held.live
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        handle.remove()
        return saved, grads

    whole, expected = step(mlp_chunks=None, checkpoint_layers="none")
    kept, grads = step(mlp_chunks="auto", checkpoint_layers="none")
    assert kept <= whole - 2 * tokens * INNER * 4
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    checkpointed, _ = step(mlp_chunks=None, checkpoint_layers="all")
    assert step(mlp_chunks="auto", checkpoint_layers="all")[0] == checkpointed
