"""PEFT adapters: the gradients of the adapted model, and frozen matrices that cost nothing but their use."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

pytest.importorskip("peft")

from adapter_models import ADAPTERS, MLP, adapted, add, lora, own_loss, step_bytes, trainable, work_of
from peft import PeftModel, PromptTuningConfig, get_peft_model_state_dict
from rewrite_models import VOCAB, build, distance, gradients, hf_loss

from lightning_mst import apply_mst
from lightning_mst.ops.deferred_logits import DeferredLogitsWarning

OPTIONS = {"mlp_chunks": 4, "lm_head_chunks": 4}
adapters = pytest.mark.parametrize("name", ADAPTERS)


@pytest.fixture(autouse=True)
def _real_logits_are_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeferredLogitsWarning)
        yield


def forms(handle) -> dict[str, set[str]]:
    """Block -> the forms of its modules."""
    return {block: {r.form for r in handle.rows if r.block == block} for block in ("MLP", "LM head", "layer")}


ALL_REWRITTEN = {"MLP": {"M = 4"}, "LM head": {"M = 4"}, "layer": {"checkpointed"}}


# --- exactness -----------------------------------------------------------------------------------------------------


@adapters
@pytest.mark.parametrize("checkpoint_layers", ["all", "none"])
def test_an_adapted_model_is_rewritten_and_exact(name, checkpoint_layers, batch):
    model = adapted(ADAPTERS[name]())
    expected_loss = own_loss(model, *batch)
    expected = gradients(model, expected_loss)
    handle = apply_mst(model, checkpoint_layers=checkpoint_layers, **OPTIONS)
    assert {"MLP": {"M = 4"}, "LM head": {"M = 4"}}.items() <= forms(handle).items()
    loss = own_loss(model, *batch)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
    assert distance(gradients(model, loss), expected) < 1e-10
    assert expected.keys() == trainable(model)


@adapters
def test_transformers_own_loss_and_single_precision_are_exact(name, batch):
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        model = adapted(ADAPTERS[name](), dtype=dtype)
        expected = gradients(model, hf_loss(model, *batch))
        apply_mst(model, **OPTIONS)
        assert distance(gradients(model, hf_loss(model, *batch)), expected) < tolerance


@adapters
def test_adapters_may_come_after_the_rewrite(name, batch):
    """PEFT then puts its layers inside rewritten modules; an adapted head may ask for its logits."""
    expected = gradients(model := adapted(ADAPTERS[name]()), own_loss(model, *batch))
    base = build("Llama 3")
    apply_mst(base, **OPTIONS)
    model = add(base, ADAPTERS[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("default" if "on the head" in name else "error", DeferredLogitsWarning)
        got = gradients(model, own_loss(model, *batch))
    assert distance(got, expected) < 1e-10


@adapters
def test_applying_again_on_the_adapted_model_brings_every_block_back_into_mini_sequences(name, batch):
    expected = gradients(model := adapted(ADAPTERS[name]()), own_loss(model, *batch))
    base = build("Llama 3")
    apply_mst(base, **OPTIONS)
    model = add(base, ADAPTERS[name]())
    handle = apply_mst(model, **OPTIONS)
    assert forms(handle) == ALL_REWRITTEN
    assert distance(gradients(model, own_loss(model, *batch)), expected) < 1e-10


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("Llama, tied", MLP),
        ("Qwen2", "all-linear"),
        ("Gemma 2", "all-linear"),
        ("Phi-3", "all-linear"),
        ("GPT-2", ["c_attn", "c_fc", "c_proj"]),
    ],
)
def test_adapters_on_other_families_are_exact(family, targets, batch):
    model = adapted(lora(targets, fan_in_fan_out=family == "GPT-2"), family)
    expected = gradients(model, own_loss(model, *batch))
    handle = apply_mst(model, **OPTIONS)
    assert forms(handle) == ALL_REWRITTEN
    # Gemma 2's norms compute in fp32 whatever the model's dtype.
    assert distance(gradients(model, own_loss(model, *batch)), expected) < (1e-6 if family == "Gemma 2" else 1e-10)


def test_a_tied_head_that_is_saved_with_its_embedding_is_exact(batch):
    config = lora(MLP, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = adapted(config, "Llama, tied")
    expected = gradients(model, own_loss(model, *batch))
    apply_mst(model, **OPTIONS)
    assert distance(gradients(model, own_loss(model, *batch)), expected) < 1e-10


def test_half_precision_adapters_are_as_near_to_the_truth_as_without_mini_sequences(batch):
    """fp32 adapters on a bf16 model, under autocast, as in QLoRA."""
    torch.manual_seed(0)
    model = adapted(lora(), dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    truthful = copy.deepcopy(model).double()
    truth = gradients(truthful, own_loss(truthful, *batch))

    def error() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = own_loss(model, *batch)
        got = gradients(model, loss)
        assert {g.dtype for g in got.values()} == {torch.float32}
        return sum(((got[n].double() - t).norm() / t.norm()).item() for n, t in truth.items())

    unmodified = error()
    for chunks in (4, 64):
        apply_mst(model, mlp_chunks=chunks, lm_head_chunks=chunks)
        assert error() <= 1.1 * unmodified


def test_prompt_tuning_lengthens_the_sequence_and_stays_exact(batch):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = add(build("Llama 3"), config)
    ids, labels = batch
    prompt = torch.full((2, 5), -100)

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(input_ids=ids, use_cache=False).logits
        assert logits.shape == (2, 38, VOCAB)
        targets = torch.cat([prompt, labels], 1)[:, 1:]
        own = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), targets.reshape(-1))
        return own, hf_loss(model, ids, labels)

    expected = [gradients(model, loss) for loss in losses()]
    apply_mst(model, **OPTIONS)
    for loss, reference, tolerance in zip(losses(), expected, (1e-10, 1e-6), strict=True):
        assert distance(gradients(model, loss), reference) < tolerance
    assert expected[0].keys() == {"prompt_encoder.default.embedding.weight"}


def test_two_adapters_are_switched_and_disabled_under_the_rewrite(batch):
    model = adapted(lora())
    torch.manual_seed(2)
    model.add_adapter("other", lora(MLP))

    def losses() -> list[float]:
        found = []
        for name in ("default", "other"):
            model.set_adapter(name)
            found.append(own_loss(model, *batch).item())
        with model.disable_adapter():
            found.append(own_loss(model, *batch).item())
        return found

    expected = losses()
    apply_mst(model, **OPTIONS)
    assert losses() == pytest.approx(expected, rel=1e-12)
    assert len(set(expected)) == 3


# --- nothing else changes ------------------------------------------------------------------------------------------


@adapters
def test_the_saved_adapter_and_the_way_back_are_those_of_the_unmodified_model(name, tmp_path):
    model = adapted(ADAPTERS[name]())
    before = [dict(m.__dict__) for m in model.modules()]
    expected = get_peft_model_state_dict(model)
    handle = apply_mst(model, **OPTIONS)
    got = get_peft_model_state_dict(model)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[n], expected[n]) for n in expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("Llama 3"), tmp_path, autocast_adapter_dtype=False)
    ids = torch.randint(3, VOCAB, (1, 9))
    handle.remove()
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert [dict(m.__dict__) for m in model.modules()] == before


@pytest.mark.parametrize("name", ["LoRA on all layers", "DoRA", "LoRA on the head"])
def test_copies_pickles_and_merged_models_are_rewritten_too(name, batch):
    model = adapted(ADAPTERS[name]())
    expected = gradients(model, own_loss(model, *batch))
    apply_mst(model, **OPTIONS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert distance(gradients(twin, own_loss(twin, *batch)), expected) < 1e-10
    loss = own_loss(model, *batch).item()
    merged = model.merge_and_unload()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeferredLogitsWarning)
        assert own_loss(merged, *batch).item() == pytest.approx(loss, rel=1e-10)
    apply_mst(merged, **OPTIONS)
    assert own_loss(merged, *batch).item() == pytest.approx(loss, rel=1e-10)


def test_generation_is_unchanged(batch):
    model = adapted(lora()).eval()
    prompt = batch[0][:, :7]
    options = {
        "attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    expected = model.generate(input_ids=prompt, **options)
    apply_mst(model, **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeferredLogitsWarning)
        assert torch.equal(model.generate(input_ids=prompt, **options), expected)


# --- what it costs -------------------------------------------------------------------------------------------------

WEIGHTS = [(48, 112)]
HEAD = (48, VOCAB)


@pytest.mark.parametrize("name", ["LoRA on all layers", "LoRA on the MLP", "LoRA on attention", "IA3"])
def test_frozen_mlp_matrices_are_used_at_most_three_times_and_get_no_gradient_matmul_or_buffer(name):
    """In passes of one MLP forward: forward, recomputation and the input's gradient. A weight's would be a fourth."""
    model = adapted(ADAPTERS[name](), dtype=torch.float32)
    ids = torch.randint(3, VOCAB, (1, 64))
    one_pass = 64 * sum(p.numel() for p in model.parameters() if set(p.shape) == {48, 112})

    def passes() -> float:
        work = work_of(model, lambda: hf_loss(model, ids, ids), *WEIGHTS)
        assert work.made == [], "a frozen weight got a buffer of its size"
        return work.multiply_adds / one_pass

    assert passes() <= 2.0  # below the first adapter, nothing needs the input's gradient
    apply_mst(model, mlp_chunks=None, lm_head_chunks=4)
    plain = passes()
    assert plain <= 3.0
    for checkpoint_layers in ("all", "none"):
        apply_mst(model, checkpoint_layers=checkpoint_layers, **OPTIONS)
        assert passes() <= 3.0 + 1e-9
    apply_mst(model, **OPTIONS)
    # Frozen, the down projection's input is needed by no gradient; plain checkpointing stops there as well.
    assert passes() <= plain + 1 / 3 + 1e-9


@pytest.mark.parametrize("name", ["LoRA on all layers", "IA3"])
def test_a_frozen_head_costs_two_matmul_passes_and_no_gradient_buffer(name):
    model = adapted(ADAPTERS[name](), dtype=torch.float32)
    ids = torch.randint(3, VOCAB, (1, 64))
    apply_mst(model, **OPTIONS)
    work = work_of(model, lambda: hf_loss(model, ids, ids), HEAD)
    assert work.multiply_adds == 2 * 63 * 48 * VOCAB  # the last token has no label
    assert work.made == []


def test_a_frozen_head_under_lora_costs_two_matmul_passes_too():
    model = adapted(ADAPTERS["LoRA on the head"](), dtype=torch.float32)
    ids = torch.randint(3, VOCAB, (1, 64))
    apply_mst(model, **OPTIONS)
    work = work_of(model, lambda: hf_loss(model, ids, ids), HEAD)
    assert work.multiply_adds <= 3 * 64 * 48 * VOCAB
    assert work.made == []


@pytest.mark.parametrize("name", ["LoRA on all layers", "LoRA on the head", "head saved"])
def test_only_adapters_get_gradients(name, batch):
    model = adapted(ADAPTERS[name]())
    apply_mst(model, **OPTIONS)
    own_loss(model, *batch).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trainable(model)


@pytest.mark.parametrize("name", ["LoRA on the MLP", "DoRA", "IA3"])
def test_bytes_fall_with_the_number_of_mlp_mini_sequences(name):
    model = add(build("Llama 3", torch.float32, intermediate_size=1024, attn_implementation="sdpa"), ADAPTERS[name]())
    ids = torch.randint(3, VOCAB, (1, 512))
    saved, peaks = zip(
        *(step_bytes(model, ids, mlp_chunks=m, lm_head_chunks=8, checkpoint_layers="none") for m in (1, 2, 8)),
        strict=True,
    )
    assert saved[1] < 0.2 * saved[0]
    assert saved[2] <= saved[1]
    assert peaks[2] < peaks[1] < peaks[0]
    peaks = [step_bytes(model, ids, mlp_chunks=m, lm_head_chunks=8)[1] for m in (1, 2, 8)]
    assert peaks[2] < peaks[1] < peaks[0]


@pytest.mark.parametrize("name", ["LoRA on all layers", "DoRA", "IA3"])
def test_checkpointed_layers_keep_no_more_than_under_plain_checkpointing(name):
    model = add(build("Llama 3", torch.float32, attn_implementation="sdpa"), ADAPTERS[name]())
    ids = torch.randint(3, VOCAB, (1, 512))
    plain, mini = (step_bytes(model, ids, mlp_chunks=m, lm_head_chunks=None)[0] for m in (None, 8))
    assert mini <= 1.02 * plain


@pytest.mark.parametrize("name", ["LoRA on all layers", "LoRA on the head", "head saved"])
def test_bytes_fall_with_the_number_of_head_mini_sequences(name):
    model = add(build("Llama 3", torch.float32, vocab_size=16384, attn_implementation="sdpa"), ADAPTERS[name]())
    ids = torch.randint(3, 16384, (1, 512))
    peaks = [step_bytes(model, ids, mlp_chunks=None, lm_head_chunks=m)[1] for m in (1, 2, 8)]
    assert peaks[2] < peaks[1] < peaks[0]
