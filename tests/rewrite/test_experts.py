"""Mixtures of experts: the pieces route by themselves, the losses over the routers are over all tokens."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import CannotBuild, build, build_and_train
from rewrite_models import MatmulCounter, PlainTransformer, distance, gradients, plain_loss
from torch import Tensor, nn

from lightning_mst import apply_mst
from lightning_mst.memory import TensorBytes
from lightning_mst.ops.chunking import mlp_num_chunks
from lightning_mst.rewrite.structure import expert_sparsity

OPTIONS = {"mlp_chunks": 4, "lm_head_chunks": 4}


def total_loss(model: nn.Module, batch: tuple[Tensor, Tensor], **options: object) -> Tensor:
    return model(input_ids=batch[0], labels=batch[1], use_cache=False, **options).loss


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "jamba", "qwen3_next", "phimoe"]
)
@pytest.mark.parametrize("checkpoint_layers", ["all", "none"])
def test_the_load_balancing_loss_and_its_gradients_are_over_all_tokens(family, checkpoint_layers, batch):
    def unmodified(model: nn.Module) -> tuple:
        plain = model(input_ids=batch[0], labels=batch[1], use_cache=False, output_router_logits=False)
        return plain, model(input_ids=batch[0], labels=batch[1], use_cache=False)

    try:
        model, (plain, output) = build_and_train(family, unmodified)
    except CannotBuild as reason:
        pytest.skip(str(reason))
    assert output.aux_loss > 0
    assert output.loss > plain.loss
    expected = gradients(model, output.loss)
    apply_mst(model, checkpoint_layers=checkpoint_layers, **OPTIONS)
    again = model(input_ids=batch[0], labels=batch[1], use_cache=False)
    torch.testing.assert_close(again.aux_loss, output.aux_loss, rtol=1e-6, atol=0)
    for new, old in zip(again.router_logits, output.router_logits, strict=True):
        assert new.shape == old.shape
        torch.testing.assert_close(new, old)
    assert distance(gradients(model, again.loss), expected) < 1e-5


def test_the_auxiliary_loss_alone_reaches_the_routers_and_what_is_before_them(batch):
    model = build("mixtral").double()

    def aux_loss() -> Tensor:
        return model(input_ids=batch[0], use_cache=False, output_router_logits=True).aux_loss

    expected = gradients(model, aux_loss())
    apply_mst(model, **OPTIONS)
    assert distance({n: g for n, g in gradients(model, aux_loss()).items() if n in expected}, expected) < 1e-6


def test_whoever_listens_to_a_router_hears_the_whole_sequence_once_and_with_a_graph(batch):
    model = build("mixtral").double()
    heard: list[Tensor] = []
    router = model.model.layers[0].mlp.gate
    router.register_forward_hook(lambda _m, _a, output: heard.append(output[0]))
    total_loss(model, batch)
    apply_mst(model, checkpoint_layers="none", **OPTIONS)
    loss = total_loss(model, batch)
    before, after = heard
    torch.testing.assert_close(after, before)
    assert after.requires_grad
    loss.backward()
    assert len(heard) == 2


def test_copies_pickles_and_removal_keep_the_routers_listeners(batch):
    model = build("mixtral").double()
    expected = gradients(model, total_loss(model, batch))
    names = [dict(m.__dict__) for m in model.modules()]
    handle = apply_mst(model, **OPTIONS)
    assert distance(gradients(model, total_loss(model, batch)), expected) < 1e-6
    twin = copy.deepcopy(model)
    assert distance(gradients(twin, total_loss(twin, batch)), expected) < 1e-6
    handle.remove()
    assert [dict(m.__dict__) for m in model.modules()] == names
    assert distance(gradients(model, total_loss(model, batch)), expected) < 1e-12


def test_a_rewritten_mixture_can_be_pickled(batch):
    model = build("qwen2_moe").double()
    apply_mst(model, **OPTIONS)
    twin = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(total_loss(twin, batch), total_loss(model, batch))


def test_the_experts_run_at_most_four_times_in_a_checkpointed_step_and_hold_less():
    model = build("mixtral", intermediate_size=448, attn_implementation="sdpa")
    ids = torch.randint(3, 211, (1, 512))
    inner = (448, 896)

    def step() -> tuple[int, int]:
        with MatmulCounter(*inner) as counter, TensorBytes() as held:
            total_loss(model, (ids, ids)).backward()
        model.zero_grad(set_to_none=True)
        return counter.total, held.peak

    apply_mst(model, mlp_chunks=None, lm_head_chunks=4, checkpoint_layers="none")
    once, _ = step()
    apply_mst(model, mlp_chunks=None, lm_head_chunks=4)
    plain, plain_bytes = step()
    apply_mst(model, mlp_chunks=8, lm_head_chunks=4)
    ours, our_bytes = step()
    assert plain <= ours <= once * 4 // 3
    assert our_bytes < 0.7 * plain_bytes


def test_frozen_experts_get_no_gradient_and_the_rest_stays_exact(batch):
    model = build("mixtral").double()
    for layer in model.model.layers:
        layer.mlp.experts.requires_grad_(False)
    expected = gradients(model, total_loss(model, batch))
    apply_mst(model, **OPTIONS)
    assert distance(gradients(model, total_loss(model, batch)), expected) < 1e-6


def test_a_mixture_on_the_meta_device_is_tried_on_a_stand_in_that_takes_no_memory():
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(num_hidden_layers=2))
    rows = [row for row in apply_mst(model, **OPTIONS).rows if row.block == "MLP"]
    assert [row.form for row in rows] == ["M = 4", "M = 4"]


class Experts(nn.Module):
    """Two experts in a list, each of which takes a limited number of tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.capacity = 3
        self.score = nn.Linear(width, 2)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        choice = self.score(flat).argmax(-1)
        result = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            rows = (choice == index).nonzero().squeeze(1)[: self.capacity]
            result[rows] = expert(flat[rows])
        return result.view_as(x)


def test_experts_with_a_capacity_are_refused_by_name_and_the_head_alone_still_works(batch):
    model = PlainTransformer().double()
    for block in model.blocks:
        block.ff = Experts(48).double()
    expected = gradients(model, plain_loss(model, *batch))
    with pytest.raises(ValueError, match=r"blocks.0.ff \(Experts\).*limited number of tokens \(capacity=3\)"):
        apply_mst(model, **OPTIONS)
    apply_mst(model, mlp_chunks=None, lm_head_chunks=4)
    assert distance(gradients(model, plain_loss(model, *batch)), expected) < 1e-10


def test_experts_written_by_hand_without_a_limit_are_rewritten_and_exact(batch):
    model = PlainTransformer().double()
    for block in model.blocks:
        block.ff = Experts(48).double()
        block.ff.capacity = None
    expected = gradients(model, plain_loss(model, *batch))
    rows = apply_mst(model, **OPTIONS).rows
    assert [row.form for row in rows if row.block == "MLP"] == ["M = 4"] * 3
    assert distance(gradients(model, plain_loss(model, *batch)), expected) < 1e-10


def test_switch_transformers_whose_experts_have_a_capacity_are_refused():
    config = transformers.SwitchTransformersConfig(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    with pytest.raises(ValueError, match="capacity"):
        apply_mst(model, **OPTIONS)


def test_a_router_that_is_asked_for_a_loss_of_ones_own_through_a_hook_trains_exactly(batch):
    model = build("mixtral").double()

    def z_loss() -> Tensor:
        heard: list[Tensor] = []
        handles = [
            layer.mlp.gate.register_forward_hook(lambda _m, _a, output: heard.append(output[0]))
            for layer in model.model.layers
        ]
        logits = model(input_ids=batch[0], use_cache=False, output_router_logits=False).logits
        for handle in handles:
            handle.remove()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[1][:, 1:].flatten())
        return loss + 0.1 * torch.stack([t.logsumexp(-1).square().mean() for t in heard]).sum()

    expected = gradients(model, z_loss())
    apply_mst(model, checkpoint_layers="none", **OPTIONS)
    assert distance(gradients(model, z_loss()), expected) < 1e-10


def test_auto_splits_experts_where_their_matmuls_stay_large():
    """8 experts, 2 to a token: an expert sees a quarter of a chunk's tokens."""
    with torch.device("meta"):
        block = transformers.MixtralForCausalLM(transformers.MixtralConfig(num_hidden_layers=2)).model.layers[0].mlp
    assert expert_sparsity(block) == 4
    assert mlp_num_chunks("auto", num_tokens=2**16, hidden_size=4096, sparsity=4) == 4
    assert mlp_num_chunks("auto", num_tokens=2**14, hidden_size=4096, sparsity=4) == 1
    assert mlp_num_chunks(7, num_tokens=2**14, hidden_size=4096, sparsity=4) == 7
