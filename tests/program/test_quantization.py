"""Adapters and quantized weights in the training program."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, LlamaConfig

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peft import LoraConfig, get_peft_model

import lightning_mst
from lightning_mst import MSTCallback
from lightning_mst.causal_lm import CausalLM
from lightning_mst.cli import main
from lightning_mst.memory import TensorBytes
from lightning_mst.models import count_parameters, from_config
from lightning_mst.program.train import build
from lightning_mst.quantization import Int8Linear, NF4Linear, quantize

WEIGHTS = pytest.mark.parametrize("weights", ["int8", "nf4"])
LAYERS = {"int8": Int8Linear, "nf4": NF4Linear}


def llama(**options: object) -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return from_config(LlamaConfig(**{"vocab_size": 50, **sizes, **options}), dtype="bfloat16")


def module(weights: str | None = "nf4", *, seed: int = 0, r: int = 4) -> CausalLM:
    torch.manual_seed(seed)
    model = llama()
    if weights is not None:
        quantize(model, weights)
    return CausalLM(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=r)))


def fit(model: CausalLM, steps: int, checkpoint: Path | None = None) -> pl.Trainer:
    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, precision="bf16-mixed", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader([{"input_ids": ids, "labels": ids}] * 8, batch_size=None), ckpt_path=checkpoint)
    return trainer


# --- quantize ------------------------------------------------------------------------------------------------------


@WEIGHTS
def test_every_linear_layer_but_the_head_is_quantized_and_everything_is_frozen(weights):
    model = llama()
    head, size = model.lm_head, sum(p.numel() for p in model.parameters())

    assert quantize(model, weights) is model

    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    assert len(linears) == 14
    assert {type(m) for m in linears} == {LAYERS[weights]}
    assert model.lm_head is head
    assert type(head) is nn.Linear
    assert not any(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert count_parameters(model) == size
    stored = sum(m.weight.nbytes for m in linears)
    assert stored * {"int8": 2, "nf4": 4}[weights] == 2 * sum(m.in_features * m.out_features for m in linears)


@WEIGHTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_quantized_layer_is_near_the_layer_it_came_from_forward_and_backward(weights, dtype, bias):
    torch.manual_seed(0)
    linear = nn.Linear(128, 192, bias=bias, dtype=dtype)
    quantized = LAYERS[weights](linear, torch.device("cpu"))
    x = torch.randn(2, 7, 128, dtype=dtype, requires_grad=True)
    gradient = torch.randn(2, 7, 192, dtype=dtype)

    got, expected = quantized(x), linear(x)
    (dx,), (expected_dx,) = (torch.autograd.grad(y, x, gradient) for y in (got, expected))

    tolerance = {"int8": 0.01, "nf4": 0.12}[weights]
    assert got.dtype == dx.dtype == dtype
    assert (got - expected).norm() < tolerance * expected.norm()
    assert (dx - expected_dx).norm() < tolerance * expected_dx.norm()


@WEIGHTS
def test_an_evaluation_leaves_the_layer_as_it_was_for_training(weights):
    """bitsandbytes repacks 4-bit weights for the CPU's bf16 units at the first evaluation, and then has no gradient."""
    layer = LAYERS[weights](nn.Linear(128, 192, dtype=torch.bfloat16), torch.device("cpu"))
    x = torch.randn(2, 7, 128, dtype=torch.bfloat16, requires_grad=True)
    before = torch.autograd.grad(layer(x).sum(), x)[0]
    with torch.no_grad():
        layer.eval()(x)

    assert torch.equal(torch.autograd.grad(layer.train()(x).sum(), x)[0], before)


@WEIGHTS
def test_a_frozen_layer_keeps_no_activations_for_the_backward_pass(weights):
    """bitsandbytes' own 8-bit layer keeps its input, also under activation checkpointing."""
    layer = LAYERS[weights](nn.Linear(128, 64, bias=False), torch.device("cpu"))
    x = torch.randn(1, 4096, 128, requires_grad=True)
    with TensorBytes([x, layer.weight]) as memory:
        y = layer(x * 1.0)
        assert memory.live <= y.nbytes + 2 * 128 * 64 * 4


@WEIGHTS
def test_bf16_autocast_leaves_the_streams_dtype_and_gives_inputs_gradients_in_their_own(weights):
    layer = LAYERS[weights](nn.Linear(128, 192, dtype=torch.bfloat16), torch.device("cpu"))
    x = torch.randn(2, 7, 128, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()

    assert y.dtype == x.grad.dtype == torch.bfloat16


@pytest.mark.gpu
@WEIGHTS
def test_on_a_gpu_the_layers_are_quantized_where_they_are_wanted_and_move_with_the_model(weights):
    model = quantize(llama(), weights, device=torch.device("cuda"))
    ids = torch.randint(0, 50, (1, 16), device="cuda")
    model.cuda()
    on_gpu = model(input_ids=ids).logits
    assert model.model.layers[0].mlp.up_proj.weight.is_cuda
    on_cpu = model.cpu()(input_ids=ids.cpu()).logits
    assert (on_gpu.cpu() - on_cpu).norm() < 0.05 * on_cpu.norm()


def test_wrong_requests_say_what_was_expected():
    with pytest.raises(ValueError, match="one of int8, nf4, got 'fp4'"):
        quantize(llama(), "fp4")
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no nn\.Linear layer to quantize besides its LM head"):
        quantize(from_config(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)), "nf4")
    with pytest.raises(ValueError, match=r"fp32, bf16 or fp16, got torch\.float64"):
        quantize(llama().double(), "int8")
    with pytest.raises(ValueError, match=r"dtype should be float32, bfloat16.*got 'int8'"):
        from_config(LlamaConfig(), dtype="int8")


# --- the program ---------------------------------------------------------------------------------------------------


@WEIGHTS
def test_a_quantized_model_with_adapters_trains_and_reports_what_is_trained(train, capsys, weights):
    result = train(f"precision={weights}-lora", "mst.mlp_chunks=3", "mst.lm_head_chunks=4", "adapter.r=2")

    assert result["status"] == "completed"
    assert (result["quantization"], result["adapter"], result["precision"]) == (weights, "lora", "bf16-mixed")
    assert 0 < result["trainable_parameters"] < result["parameters"]
    assert result["val_perplexity"] == pytest.approx(math.exp(result["val_loss"]), rel=1e-5)
    shown = capsys.readouterr().out
    assert f"({result['trainable_parameters']:,} trained), {weights} weights, lora, bf16-mixed" in shown


@WEIGHTS
def test_mini_sequences_train_the_same_quantized_model(train, tmp_path, weights):
    common = (f"precision={weights}-lora", "optimizer.lr=0.01")
    off = train(*common, "mst=off", folder=tmp_path / "off")
    for setting in (["mst=auto"], ["mst=paper"], ["mst.mlp_chunks=3", "mst.lm_head_chunks=5"]):
        losses = train(*common, *setting, folder=tmp_path / "on")["losses"]
        assert losses == pytest.approx(off["losses"], rel=2e-3)  # bf16
    assert off["losses"][0] != off["losses"][-1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "16-mixed"])
def test_adapters_go_with_every_precision(train, precision):
    result = train(f"precision={precision}", "adapter=lora", "adapter.use_dora=true")

    assert result["trainable_parameters"] < result["parameters"]
    assert result["quantization"] is None


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("choices", [[], ["precision=nf4-lora"], ["precision=bf16-true"]])
def test_optimizers_with_8_bit_states_train(train, name, choices):
    result = train(f"optimizer={name}", "optimizer.lr=0.01", "trainer.max_steps=4", *choices)

    assert result["losses"][-1] < result["losses"][0]


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_optimizers_hold_states_of_the_adapters_alone(compose_config, name):
    model = module("nf4")
    model.optimizer = build(compose_config(f"optimizer={name}").optimizer)
    model(**dict.fromkeys(("input_ids", "labels"), torch.randint(0, 50, (1, 16)))).backward()
    optimizer = model.configure_optimizers()
    optimizer.step()

    trained = {p for p in model.parameters() if p.requires_grad}
    assert set(optimizer.state) == trained
    assert all("lora" in n for n, p in model.named_parameters() if p.requires_grad)


@pytest.fixture
def saved_model(tmp_path: Path) -> Path:
    llama(vocab_size=300).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_trained_weights_are_quantized_too(tiny, saved_model, tmp_path):
    overrides = [override for override in tiny if not override.startswith("model.")]
    overrides += ["model=hf", f"model.name='{saved_model}'", "data.tokenizer=null", "precision=nf4-lora"]

    main(["train", *overrides, f"hydra.run.dir='{tmp_path}'"])

    assert (tmp_path / "result.json").is_file()


@WEIGHTS
@pytest.mark.parametrize("model", ["llama_small", "llama3_8b", "llama2_7b", "mistral_7b", "qwen2_7b", "gemma2_9b"])
def test_the_precisions_compose_with_every_model(compose_config, weights, model):
    config = compose_config(f"precision={weights}-lora", f"model={model}")

    assert config.quantization.weights == weights
    assert config.model.dtype == "bfloat16"
    assert config.trainer.precision == "bf16-mixed"
    assert build(config.adapter).target_modules == "all-linear"
    assert config.model.config.vocab_size is None or config.model.config.vocab_size > 30000


def test_the_parts_of_a_precision_can_be_chosen_one_by_one(compose_config):
    config = compose_config("precision=bf16-true", "quantization=nf4", "adapter=lora", "adapter.r=8")
    assert (config.trainer.precision, config.quantization.weights, config.adapter.r) == ("bf16-true", "nf4", 8)

    assert not compose_config().quantization
    assert not compose_config().adapter


@pytest.mark.parametrize(("weights", "tokens"), [("int8", 110), ("nf4", 140)])
def test_the_papers_quantized_rows_are_experiments(compose_config, weights, tokens):
    config = compose_config(f"experiment=paper_llama3_8b_{weights}")

    assert config.data.sequence_length == tokens * 1024
    assert config.quantization.weights == weights
    assert config.model.config.num_hidden_layers == 32
    assert config.mst.lm_head_chunks == "paper"
    assert config.trainer.accelerator == "gpu"
    OmegaConf.to_container(config, resolve=True)


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_badly(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run with a mistake that must show before any data is read; return what stderr says."""

    def run(*overrides: str) -> str:
        with pytest.raises(SystemExit) as exit_info:
            main(["train", *tiny, "data.paths=[no/such/file.txt]", f"hydra.run.dir='{tmp_path}'", *overrides])
        assert exit_info.value.code == 1
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert "no file 'no/such/file.txt'" not in error
        return error

    return run


@pytest.mark.parametrize(
    ("package", "overrides", "part", "extra"),
    [
        ("peft", ["adapter=lora"], "adapter", "peft"),
        ("peft", ["precision=nf4-lora"], "adapter", "peft"),
        ("bitsandbytes", ["precision=nf4-lora"], "quantization", "quantized"),
        ("bitsandbytes", ["optimizer=adamw_8bit"], "optimizer", "quantized"),
    ],
)
def test_a_missing_package_is_named_with_its_extra_before_any_work(
    run_badly, monkeypatch, package, overrides, part, extra
):
    for name in [*sys.modules]:
        if name == "lightning_mst.quantization" or name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delattr(lightning_mst, "quantization")

    error = run_badly(*overrides)

    assert f"{part}: The package {package} is not installed: pip install 'lightning-mst[{extra}]'" in error


def test_quantized_weights_without_an_adapter_are_refused(run_badly):
    assert "so that nothing would be trained. Add an adapter (adapter=lora)" in run_badly("quantization=nf4")


def test_an_adapter_that_fits_nothing_is_refused_before_training(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", *tiny, f"hydra.run.dir='{tmp_path}'", "adapter=lora", "adapter.target_modules=[nowhere]"])
    assert "adapter: " in (error := capsys.readouterr().err)
    assert "nowhere" in error


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["int8", "nf4", None])
def test_a_checkpoint_holds_the_adapters_and_resumes_on_the_same_base(weights, tmp_path):
    whole, first, second = module(weights), module(weights), module(weights)
    fit(whole, 4)
    fit(first, 2).save_checkpoint(tmp_path / "two.ckpt")

    fit(second, 4, tmp_path / "two.ckpt")

    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)["state_dict"]
    assert all("lora" in name for name in saved)
    trained = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    assert trained.keys() == saved.keys()
    assert all(torch.equal(p, second.get_parameter(n)) for n, p in trained.items())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: module("nf4", seed=1), r"embed_tokens.weight was bfloat16 of shape \(50, 64\) with the bit sum"),
        (lambda: module("int8"), r"q_proj.base_layer.weight was uint8 .*here it is int8"),
        (lambda: module(None), r"q_proj.base_layer.weight was uint8 .*here it is bfloat16"),
        (lambda: CausalLM(llama()), "only the checkpoint has .*lora_A"),
    ],
)
def test_a_checkpoint_is_refused_by_another_base(other, message, tmp_path):
    fit(module("nf4"), 1).save_checkpoint(tmp_path / "one.ckpt")

    with pytest.raises(ValueError, match=message):
        fit(other(), 2, tmp_path / "one.ckpt")


def test_the_checkpoint_of_a_fully_trained_model_is_whole_and_refused_by_adapters(tmp_path):
    model = CausalLM(llama())
    fit(model, 1).save_checkpoint(tmp_path / "one.ckpt")

    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == model.state_dict().keys()
    assert "frozen_weights" not in saved
    with pytest.raises(ValueError, match="only the"):
        fit(module("nf4"), 2, tmp_path / "one.ckpt")


@WEIGHTS
def test_the_callback_verifies_a_quantized_model(weights):
    model = module(weights)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, precision="bf16-mixed", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[MSTCallback(mlp_chunks=4, lm_head_chunks=4, verify=True)],
    )  # fmt: skip
    ids = torch.randint(0, 50, (2, 33))
    trainer.fit(model, DataLoader([{"input_ids": ids, "labels": ids}], batch_size=None))
    assert trainer.global_step == 1
