"""Every family in the support table: the same loss, the same gradients, the same everything else."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from rewrite_models import BASE, FAMILIES, VOCAB, build, distance, gradients, hf_loss, multiply_adds
from torch import nn

from lightning_mst import apply_mst
from lightning_mst.ops.deferred_logits import DeferredLogits, DeferredLogitsWarning

OPTIONS = {"mlp_chunks": 4, "lm_head_chunks": 4}
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _real_logits_are_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeferredLogitsWarning)
        yield


@families
@pytest.mark.parametrize("checkpoint_layers", ["all", "none", 2])
def test_gradients_equal_the_unmodified_models_with_transformers_own_loss(family, checkpoint_layers, batch):
    model = build(family)
    expected_loss = hf_loss(model, *batch)
    expected = gradients(model, expected_loss)
    apply_mst(model, checkpoint_layers=checkpoint_layers, **OPTIONS)
    loss = hf_loss(model, *batch)
    # transformers casts logits to fp32 for its loss, so 1e-6 is exact here.
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert distance(gradients(model, loss), expected) < 1e-6


@families
def test_gradients_equal_the_unmodified_models_with_a_loss_of_ones_own(family, batch):
    ids, labels = batch
    model = build(family)

    def loss() -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[..., :-1, :].reshape(-1, VOCAB), labels[..., 1:].reshape(-1))

    expected = gradients(model, loss())
    apply_mst(model, **OPTIONS)
    # Gemma 2's norms compute in fp32 whatever the model's dtype, and the one after the MLP runs in mini-sequences.
    assert distance(gradients(model, loss()), expected) < (1e-6 if family == "Gemma 2" else 1e-10)


@families
def test_gradients_are_exact_in_single_precision(family, batch):
    model = build(family, torch.float32)
    expected = gradients(model, hf_loss(model, *batch))
    apply_mst(model, **OPTIONS)
    assert distance(gradients(model, hf_loss(model, *batch)), expected) < 1e-5


@families
@pytest.mark.parametrize("chunks", [4, 256])
def test_half_precision_gradients_are_as_near_to_the_truth_as_the_unmodified_models(family, chunks, batch):
    """Summed over all parameters: a single small one's error is a matter of luck."""

    def error(model: nn.Module, truth: dict[str, torch.Tensor]) -> float:
        got = gradients(model, hf_loss(model, *batch))
        return sum(((got[n].double() - t).norm() / t.norm()).item() for n, t in truth.items() if t.norm() > 0)

    model = build(family, torch.bfloat16)
    truthful = copy.deepcopy(model).double()
    truth = gradients(truthful, hf_loss(truthful, *batch))
    unmodified = error(model, truth)
    apply_mst(model, mlp_chunks=chunks, lm_head_chunks=chunks)
    assert error(model, truth) <= 1.1 * unmodified


@families
def test_autocast_gradients_are_as_near_to_the_truth_as_the_unmodified_models(family, batch):
    model = build(family, torch.float32)
    truthful = copy.deepcopy(model).double()
    truth = gradients(truthful, hf_loss(truthful, *batch))

    def error() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = hf_loss(model, *batch)
        got = gradients(model, loss)
        return sum(((got[n].double() - t).norm() / t.norm()).item() for n, t in truth.items() if t.norm() > 0)

    unmodified = error()
    apply_mst(model, **OPTIONS)
    assert error() <= 1.1 * unmodified


@families
def test_copies_and_pickles_are_rewritten_too_and_independent(family, batch):
    model = build(family)
    expected = gradients(model, hf_loss(model, *batch))
    handle = apply_mst(model, **OPTIONS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model.zero_grad(set_to_none=True)
        output = twin(input_ids=batch[0], labels=batch[1], use_cache=False)
        assert isinstance(output.logits, DeferredLogits)
        assert distance(gradients(twin, output.loss), expected) < 1e-6
        assert all(p.grad is None for p in model.parameters())
    handle.remove()
    assert not isinstance(model(input_ids=batch[0], use_cache=False).logits, DeferredLogits)


@families
def test_generation_is_unchanged(family, batch):
    model = build(family).eval()
    prompt = batch[0][:, :7]
    options = {
        "attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    expected = model.generate(prompt, **options)
    apply_mst(model, **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeferredLogitsWarning)
        assert torch.equal(model.generate(prompt, **options), expected)


@families
def test_nothing_but_behaviour_changes(family, tmp_path):
    model = build(family)
    before = {
        "state_dict": list(model.state_dict()),
        "modules": [(name, type(m)) for name, m in model.named_modules()],
        "parameters": [id(p) for p in model.parameters()],
        "instances": [dict(m.__dict__) for m in model.modules()],
    }
    handle = apply_mst(model, **OPTIONS)
    assert list(model.state_dict()) == before["state_dict"]
    assert [(name, type(m)) for name, m in model.named_modules()] == before["modules"]
    assert [id(p) for p in model.parameters()] == before["parameters"]
    model.save_pretrained(tmp_path / "rewritten")
    handle.remove()
    model.save_pretrained(tmp_path / "plain")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "rewritten" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert [dict(m.__dict__) for m in model.modules()] == before["instances"]


@families
def test_a_checkpointed_step_runs_the_mlp_at_most_four_times(family):
    """In passes of one MLP forward: plain checkpointing takes 3.67 for a gated MLP, the usual tiled MLPs 5."""
    model = build(family, torch.float32)
    ids = torch.randint(3, VOCAB, (1, 64))
    widths = (model.config.n_inner or 192,) if family == "GPT-2" else (112, 224)

    def passes() -> float:
        weights = [p for p in model.parameters() if p.dim() == 2 and set(p.shape) & set(widths)]
        one_pass = 64 * sum(p.numel() for p in weights)
        return multiply_adds(model, lambda: hf_loss(model, ids, ids), *widths) / one_pass

    assert passes() == pytest.approx(3.0)
    apply_mst(model, mlp_chunks=None, lm_head_chunks=4, checkpoint_layers="all")
    plain = passes()
    apply_mst(model, mlp_chunks=4, lm_head_chunks=4, checkpoint_layers="all")
    assert passes() <= 4.0 + 1e-9
    if family not in ("GPT-2", "Gemma 2"):  # there the MLP does not end in a linear layer, or a norm follows it
        assert passes() == pytest.approx(plain)
    apply_mst(model, mlp_chunks=4, lm_head_chunks=4, checkpoint_layers="none")
    assert passes() <= 4.0 + 1e-9


@families
def test_the_lm_head_takes_three_matmul_passes_and_two_when_it_is_frozen(family):
    model = build(family, torch.float32)
    ids = torch.randint(3, VOCAB, (1, 64))
    head = model.get_output_embeddings().weight
    one_pass = 63 * head.numel()  # the last token has no label
    apply_mst(model, **OPTIONS)
    assert multiply_adds(model, lambda: hf_loss(model, ids, ids), VOCAB) == 3 * one_pass
    head.requires_grad_(False)
    assert multiply_adds(model, lambda: hf_loss(model, ids, ids), VOCAB) == 2 * one_pass


@pytest.mark.parametrize(
    ("name", "options"),
    [("Olmo2", {}), ("Gemma3Text", {"head_dim": 12, "query_pre_attn_scalar": 12}), ("Glm4", {"head_dim": 12})],
)
def test_other_layers_whose_norm_joins_the_mlp_stay_exact_without_a_second_run_of_it(name, options, batch):
    config = getattr(transformers, f"{name}Config")(**{**BASE, **options})
    model = transformers.AutoModelForCausalLM.from_config(config).double().train()
    expected = gradients(model, hf_loss(model, *batch))
    handle = apply_mst(model, **OPTIONS)
    assert all("layernorm joins it" in row.reason for row in handle.rows if row.block == "MLP")
    assert distance(gradients(model, hf_loss(model, *batch)), expected) < 1e-6
    one_pass = 66 * sum(p.numel() for p in model.parameters() if p.dim() == 2 and set(p.shape) & {112, 224})
    assert multiply_adds(model, lambda: hf_loss(model, *batch), 112, 224) <= 4 * one_pass
