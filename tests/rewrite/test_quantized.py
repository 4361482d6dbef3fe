"""Quantized weights: bitsandbytes' and torchao's, alone and under adapters, in mini-sequence form."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import transformers

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

import bitsandbytes as bnb
import torchao.quantization as torchao
from adapter_models import MLP, add, lora, own_loss, step_bytes, trainable, work_of
from peft import prepare_model_for_kbit_training
from rewrite_models import VOCAB, build, distance, gradients, hf_loss
from torch import nn

from lightning_mst import apply_mst
from lightning_mst.ops.deferred_logits import DeferredLogitsWarning
from lightning_mst.quantization import Int8Linear, NF4Linear, quantize

OPTIONS = {"mlp_chunks": 4, "lm_head_chunks": 4}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _real_logits_are_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeferredLogitsWarning)
        yield


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module], *, head: bool = False) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and (head or child is not model.get_output_embeddings()):
                setattr(parent, name, make(child))
    return model.requires_grad_(False)


def bnb_nf4(linear: nn.Linear) -> nn.Module:
    """As transformers makes it, for the compute dtype of the weight."""
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4", module=layer)
    return layer.to(CPU)


def bnb_int8(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(linear.weight.detach(), requires_grad=False)
    return layer.to(CPU)


def with_torchao(config: Callable[[], object]) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        head = model.get_output_embeddings()
        torchao.quantize_(model, config(), filter_fn=lambda m, _: isinstance(m, nn.Linear) and m is not head)
        return model.requires_grad_(False)

    return change


def head_too(kind: str) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        quantize(model, kind)
        model.lm_head = {"nf4": NF4Linear, "int8": Int8Linear}[kind](model.lm_head, CPU)
        return model

    return change


QUANTIZED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nf4": lambda model: quantize(model, "nf4"),
    "int8": lambda model: quantize(model, "int8"),
    "bitsandbytes' own nf4": lambda model: replace_linears(model, bnb_nf4),
    "bitsandbytes' own int8": lambda model: replace_linears(model, bnb_int8),
    "nf4, head too": head_too("nf4"),
    "int8, head too": head_too("int8"),
    "torchao int8": with_torchao(torchao.Int8WeightOnlyConfig),
    "torchao int4": with_torchao(lambda: torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4)),
}
kinds = pytest.mark.parametrize("kind", QUANTIZED)
ours = pytest.mark.parametrize("kind", ["nf4", "int8"])


def base(kind: str, dtype: torch.dtype = torch.float32, **overrides: object) -> nn.Module:
    # bitsandbytes' 4-bit kernel for evaluation on a CPU wants multiples of 32.
    sizes = {"hidden_size": 64, "intermediate_size": 128, **overrides}
    return QUANTIZED[kind](build("Llama 3", dtype, **sizes))


def quantized(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A quantized model of which the norms are trained."""
    model = base(kind, dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return model


def qlora(kind: str, dtype: torch.dtype = torch.float32, **overrides: object) -> nn.Module:
    return add(base(kind, dtype, **overrides), lora())


def truthful(model: nn.Module) -> nn.Module:
    """The same function in fp64: every quantized layer as the matrix that it stands for."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and "lora" not in name and not child.weight.requires_grad:
                dense = nn.Linear(child.in_features, child.out_features, bias=False, dtype=torch.float64)
                eye = torch.eye(child.in_features, dtype=torch.float32)
                with torch.no_grad():
                    dtype = child.weight.dtype if child.weight.is_floating_point() else torch.float32
                    dense.weight.copy_(child(eye.to(dtype)).T)
                setattr(parent, name, dense.requires_grad_(False))
    return twin.double()


# --- exactness -----------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("make", [quantized, qlora])
@pytest.mark.parametrize("checkpoint_layers", ["all", "none"])
def test_a_quantized_model_is_rewritten_and_exact(kind, make, checkpoint_layers, batch):
    model = make(kind)
    expected_loss = own_loss(model, *batch)
    expected = gradients(model, expected_loss)
    handle = apply_mst(model, checkpoint_layers=checkpoint_layers, **OPTIONS)
    assert {r.form for r in handle.rows if r.block in ("MLP", "LM head")} == {"M = 4"}
    loss = own_loss(model, *batch)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert distance(gradients(model, loss), expected) < 1e-5
    assert expected.keys() == trainable(model)


@kinds
def test_the_rewrite_may_come_before_the_adapters(kind, batch):
    expected = gradients(model := qlora(kind), own_loss(model, *batch))
    model = base(kind)
    apply_mst(model, **OPTIONS)
    model = add(model, lora())
    assert distance(gradients(model, own_loss(model, *batch)), expected) < 1e-5
    apply_mst(model, **OPTIONS)
    assert distance(gradients(model, own_loss(model, *batch)), expected) < 1e-5


class Error:
    """How far a model's gradients are from the truth, over a few batches: one batch's rounding is a matter of luck."""

    def __init__(self, model: nn.Module, device: str = "cpu") -> None:
        self.model, self.device = model.to(device), device
        reference = truthful(model).to(device)
        generator = torch.Generator().manual_seed(1)
        self.batches = [torch.randint(3, VOCAB, (2, 33), generator=generator).to(device) for _ in range(6)]
        self.truths = [gradients(reference, own_loss(reference, ids, ids)) for ids in self.batches]

    def __call__(self, *, autocast: bool) -> float:
        """Relative errors of all gradients, added up."""
        total = 0.0
        for ids, truth in zip(self.batches, self.truths, strict=True):
            with torch.autocast(self.device, torch.bfloat16, enabled=autocast):
                loss = own_loss(self.model, ids, ids)
            got = gradients(self.model, loss)
            total += sum(((got[n].double() - t).norm() / t.norm()).item() for n, t in truth.items())
        return total


@pytest.mark.parametrize("kind", [k for k in QUANTIZED if "torchao" not in k])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_gradients_are_as_near_to_the_truth_as_the_unmodified_models(kind, autocast):
    model = qlora(kind, torch.bfloat16)
    error = Error(model)
    unmodified = error(autocast=autocast)
    apply_mst(model, **OPTIONS)
    assert error(autocast=autocast) <= 1.1 * unmodified


@kinds
def test_training_goes_on_after_an_evaluation(kind, batch):
    """On some CPUs bitsandbytes' own 4-bit layers lose their gradient in an evaluation; the probe is one."""
    model = qlora(kind)
    expected = gradients(model, own_loss(model, *batch))
    apply_mst(model, **OPTIONS)
    if "own nf4" not in kind:
        model.eval()
        with torch.no_grad():
            hf_loss(model, *batch)
        model.train()
    assert distance(gradients(model, own_loss(model, *batch)), expected) < 1e-5


@ours
def test_a_model_prepared_for_kbit_training_stays_exact(kind):
    """PEFT casts norms and head to fp32, lets inputs require gradients, and switches checkpointing on."""
    prepared = prepare_model_for_kbit_training(base(kind, torch.bfloat16), use_gradient_checkpointing=True)
    model = add(prepared, lora())
    assert model.get_output_embeddings().weight.dtype == torch.float32
    error = Error(model)
    unmodified = error(autocast=True)
    handle = apply_mst(model, **OPTIONS)
    assert {r.form for r in handle.rows} == {"M = 4", "checkpointed"}
    assert error(autocast=True) <= 1.1 * unmodified


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ],
)
def test_a_model_that_transformers_quantized_while_loading_is_exact(options, batch, tmp_path):
    build("Llama 3", torch.float32, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(**options)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32, device_map="cpu", attn_implementation="eager"
    )
    model = add(loaded, lora()).train()
    expected = gradients(model, own_loss(model, *batch))
    handle = apply_mst(model, **OPTIONS)
    assert {r.form for r in handle.rows} == {"M = 4", "checkpointed"}
    assert distance(gradients(model, own_loss(model, *batch)), expected) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [k for k in QUANTIZED if "torchao" not in k])
def test_on_a_gpu_quantized_models_are_as_near_to_the_truth_as_the_unmodified_ones(kind):
    model = qlora(kind, torch.bfloat16)
    error = Error(model, "cuda")
    unmodified = error(autocast=True)
    apply_mst(model, **OPTIONS)
    assert error(autocast=True) <= 1.1 * unmodified


@pytest.mark.gpu
def test_on_a_gpu_torchaos_packed_int4_weights_are_exact(batch):
    pytest.importorskip("mslk")
    model = build("Llama 3", torch.bfloat16, hidden_size=256, intermediate_size=512).cuda()
    with_torchao(lambda: torchao.Int4WeightOnlyConfig(group_size=128))(model)
    model = add(model, lora())
    ids, labels = (t.cuda() for t in batch)
    expected = gradients(model, own_loss(model, ids, labels))
    apply_mst(model, **OPTIONS)
    assert distance(gradients(model, own_loss(model, ids, labels)), expected) < 5e-2


# --- nothing else changes ------------------------------------------------------------------------------------------


@kinds
def test_copies_and_pickles_of_quantized_models_are_rewritten_too(kind, batch):
    model = qlora(kind)
    expected = gradients(model, own_loss(model, *batch))
    apply_mst(model, **OPTIONS)
    twins = [copy.deepcopy(model)]
    if "torchao" not in kind:  # its tensors are not made for pickling
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert distance(gradients(twin, own_loss(twin, *batch)), expected) < 1e-5


@kinds
def test_names_states_and_instances_are_given_back(kind):
    model = qlora(kind)
    own_loss(model, *[torch.randint(3, VOCAB, (1, 9))] * 2)  # bitsandbytes moves its scales at the first call
    names, before = list(model.state_dict()), [dict(m.__dict__) for m in model.modules()]
    handle = apply_mst(model, **OPTIONS)
    assert list(model.state_dict()) == names
    handle.remove()
    assert [set(m.__dict__) for m in model.modules()] == [set(b) for b in before]


# --- what it costs -------------------------------------------------------------------------------------------------


@ours
def test_quantized_mlp_matrices_are_used_at_most_three_times(kind):
    """In passes of one MLP forward: forward, recomputation and the input's gradient, as with plain checkpointing."""
    model = qlora(kind)
    ids = torch.randint(3, VOCAB, (1, 50))
    one_pass = 50 * 64 * 128 * 3 * 2

    def passes() -> float:
        return work_of(model, lambda: hf_loss(model, ids, ids), (64, 128)).multiply_adds / one_pass

    assert passes() == pytest.approx(2.0)
    apply_mst(model, mlp_chunks=None, lm_head_chunks=4)
    plain = passes()
    apply_mst(model, **OPTIONS)
    assert passes() <= min(3.0, plain + 1 / 3) + 1e-9
    apply_mst(model, checkpoint_layers="none", **OPTIONS)
    assert passes() <= 3.0 + 1e-9


@ours
def test_a_quantized_head_costs_at_most_three_passes(kind):
    model = add(base(f"{kind}, head too"), lora(MLP))
    ids = torch.randint(3, VOCAB, (1, 50))
    apply_mst(model, **OPTIONS)
    work = work_of(model, lambda: hf_loss(model, ids, ids), (64, VOCAB))
    assert work.multiply_adds <= 3 * 50 * 64 * VOCAB


@ours
def test_bytes_fall_with_the_number_of_mini_sequences(kind):
    model = qlora(kind, intermediate_size=1024, attn_implementation="sdpa")
    ids = torch.randint(3, VOCAB, (1, 1024))
    saved, peaks = zip(
        *(step_bytes(model, ids, mlp_chunks=m, lm_head_chunks=8, checkpoint_layers="none") for m in (1, 2, 8)),
        strict=True,
    )
    assert saved[1] < 0.2 * saved[0]
    assert saved[2] <= saved[1]
    assert peaks[2] < peaks[1] < peaks[0]


@ours
def test_checkpointed_layers_keep_their_inputs_alone(kind):
    """bitsandbytes' own 8-bit layers would keep every linear layer's input, out of reach of checkpointing."""
    model = qlora(kind)
    ids = torch.randint(3, VOCAB, (1, 1024))
    saved = step_bytes(model, ids, mlp_chunks=4, lm_head_chunks=8)[0]
    dense = add(build("Llama 3", torch.float32, hidden_size=64, intermediate_size=128), lora())
    plain = step_bytes(dense, ids, mlp_chunks=None, lm_head_chunks=8)[0]
    assert saved <= 1.02 * plain
