"""The configurations in conf/."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import FSDPStrategy, StrategyRegistry
from omegaconf import OmegaConf
from torch import nn

import lightning_mst
from lightning_mst.configurations import conf_dir
from lightning_mst.data import TextDataModule
from lightning_mst.on_host import deepspeed_cpu_adam
from lightning_mst.on_host.engine import without_accelerator
from lightning_mst.program.errors import ConfigurationError
from lightning_mst.program.strategy import build_strategy, check_strategy
from lightning_mst.program.train import build, missing_keys
from lightning_mst.strategies import MSTDDPStrategy, MSTFSDPStrategy
from lightning_mst.training.registration import STRATEGIES

CONF = conf_dir()
OPTIONS = [(path.parent.name, path.stem) for path in sorted(CONF.glob("*/*.yaml")) if not path.stem.startswith("_")]
# Published sizes, in billions of parameters.
SIZES = {"llama3_8b": 8.03, "llama2_7b": 6.74, "mistral_7b": 7.24, "qwen2_7b": 7.62, "gemma2_9b": 9.24}
# What a choice leaves to the user.
MANDATORY = {
    ("model", "hf"): ["model.name"],
    ("data", "text"): ["data.paths"],
    ("data", "jsonl"): ["data.paths"],
    ("data", "parquet"): ["data.paths"],
    ("data", "hub"): ["data.path"],
}


def stems(group: str) -> list[str]:
    return [name for found, name in OPTIONS if found == group]


def test_the_checkouts_configurations_are_the_ones_found():
    assert Path(__file__).resolve().parents[2] / "conf" == CONF


def test_every_group_has_the_options_that_the_documentation_names():
    assert {"off", "auto", "paper", "recompute"} <= set(stems("mst"))
    assert stems("precision") == [
        "16-mixed", "16-true", "32-true", "64-true", "bf16-mixed", "bf16-true", "int8-lora", "nf4-lora"
    ]  # fmt: skip
    assert set(stems("strategy")) == {"auto", "ddp", *STRATEGIES}
    assert stems("quantization") == ["int8", "nf4", "none"]
    assert stems("adapter") == ["lora", "none"]
    assert {"stdlib", "text", "jsonl", "parquet", "hub"} == set(stems("data"))
    assert {"csv", "tensorboard", "wandb", "none"} == set(stems("logger"))
    assert {"llama_small", "hf", *SIZES} == set(stems("model"))


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_composes_and_lacks_only_what_the_user_must_say(compose_config, group, name):
    config = compose_config(f"{group}={name}")

    missing = missing_keys(OmegaConf.to_container(config, resolve=False))
    assert missing == MANDATORY.get((group, name), [])
    if not missing:
        OmegaConf.to_container(config, resolve=True)  # every interpolation leads somewhere


@pytest.mark.parametrize("name", stems("mst"))
def test_every_mst_option_holds_exactly_the_fields_of_the_config(compose_config, name):
    config = compose_config(f"mst={name}")

    assert set(config.mst) == {field.name for field in fields(lightning_mst.MSTConfig)}
    lightning_mst.MSTConfig(**OmegaConf.to_container(config.mst))


def test_off_is_the_name_of_an_option_and_no_boolean(compose_config):
    config = compose_config("mst=off")

    assert config.mst == {
        "mlp_chunks": None,
        "lm_head_chunks": None,
        "checkpoint_layers": "none",
        "layer_chunks": None,
        "checkpoint_offload": None,
        "offload_fraction": 0.0,
        "mlp_modules": None,
        "lm_head_module": None,
        "device_memory": None,
        "sequence_length": None,
        "batch_size": 1,
    }


def test_the_callback_takes_its_arguments_from_the_mst_group(compose_config):
    config = compose_config("mst=paper", "mst.mlp_chunks=3", "callbacks.mst.verify=true")

    assert set(config.callbacks.mst) - {"_target_"} == set(inspect.signature(lightning_mst.MSTCallback).parameters)
    assert config.callbacks.mst.mlp_chunks == 3
    assert config.callbacks.mst.lm_head_chunks == "paper"
    assert config.callbacks.mst.verify is True


@pytest.mark.parametrize("name", stems("data"))
def test_every_data_option_names_arguments_of_the_data_module(compose_config, name):
    config = compose_config(f"data={name}")

    assert set(config.data) - {"_target_"} <= set(inspect.signature(TextDataModule).parameters)


@pytest.mark.parametrize("name", stems("precision"))
def test_every_precision_sets_the_trainers(compose_config, name):
    assert compose_config(f"precision={name}").trainer.precision == ("bf16-mixed" if "lora" in name else name)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_what_lightning_makes_of_its_name(compose_config, name):
    if "deepspeed" in name:
        pytest.importorskip("deepspeed")
    class_name, options = STRATEGIES[name]
    config = compose_config(f"strategy={name}")

    assert config.strategy._target_ == f"lightning_mst.strategies.{class_name}"
    assert {key: config.strategy[key] for key in options} == options
    assert type(build_strategy(config.trainer.strategy)) is type(StrategyRegistry.get(name))


def test_a_strategy_is_named_by_its_file_by_its_registered_name_or_by_its_class(compose_config):
    def built(*overrides: str):
        return build_strategy(compose_config(*overrides).trainer.strategy)

    assert built() == "auto"
    assert built("trainer.strategy=mst_ddp") == "mst_ddp"
    assert isinstance(built("trainer.strategy=lightning_mst.strategies.MSTDDPStrategy"), MSTDDPStrategy)
    option = built("strategy=mst_model_parallel", "strategy.data_parallel_size=2")
    assert option._data_parallel_size == 2


@pytest.mark.parametrize("name", stems("optimizer"))
def test_every_optimizer_is_a_partial_that_takes_parameters(compose_config, name):
    config = compose_config(f"optimizer={name}")
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    layer = nn.Linear(3, 3)
    before = layer.weight.detach().clone()

    if config.optimizer._target_ == "lightning_mst.on_host.deepspeed_cpu_adam":
        make = build(config.optimizer)
        assert make.func is deepspeed_cpu_adam
        # Its kernel takes a minute to compile. These options are those of DeepSpeed's class.
        inspect.signature(pytest.importorskip("deepspeed.ops.adam").DeepSpeedCPUAdam).bind([], **make.keywords)
        return
    with without_accelerator():
        optimizer = build(config.optimizer)(list(layer.parameters()))
    optimizer.step(lambda: layer(torch.ones(2, 3)).sum().backward())

    assert not torch.equal(layer.weight, before)
    assert "lr" in config.optimizer  # the same name everywhere: model=hf and experiments set it


@pytest.mark.parametrize("name", stems("scheduler"))
def test_every_scheduler_is_a_partial_that_takes_an_optimizer(compose_config, name):
    config = compose_config(f"scheduler={name}")
    if name == "none":
        assert not config.scheduler
        return
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(()))], lr=1.0)
    scheduler = build(config.scheduler)(optimizer)
    first = optimizer.param_groups[0]["lr"]
    optimizer.step()
    scheduler.step()
    assert 0 <= first < optimizer.param_groups[0]["lr"] <= 1  # both warm up


@pytest.mark.parametrize(("name", "billions"), SIZES.items())
def test_real_models_have_their_published_sizes(compose_config, name, billions):
    config = compose_config(f"model={name}")

    with torch.device("meta"):
        model = build(config.model)

    parameters = sum(parameter.numel() for parameter in model.parameters())  # tied weights count once
    assert round(parameters / 1e9, 2) == billions
    assert model.training


def test_published_constants_reach_the_models(compose_config):
    def config_of(name: str):
        return instantiate(compose_config(f"model={name}").model.config, _convert_="all")

    llama3, gemma2, mistral = config_of("llama3_8b"), config_of("gemma2_9b"), config_of("mistral_7b")
    assert llama3.rope_parameters["rope_theta"] == 500000.0
    assert config_of("qwen2_7b").rope_parameters["rope_theta"] == 1000000.0
    assert (llama3.rms_norm_eps, gemma2.rms_norm_eps) == (1e-5, 1e-6)
    assert (gemma2.final_logit_softcapping, gemma2.attn_logit_softcapping) == (30.0, 50.0)
    assert (gemma2.query_pre_attn_scalar, gemma2.tie_word_embeddings) == (256, True)
    assert gemma2.layer_types.count("sliding_attention") == 21
    assert mistral.sliding_window == 4096
    assert config_of("qwen2_7b").sliding_window is None


def test_an_experiment_picks_other_options(compose_config):
    config = compose_config("experiment=paper_llama3_8b")

    assert config.model.config.hidden_size == 4096
    assert config.mst.mlp_chunks == "paper"
    assert config.trainer.precision == "bf16-true"
    assert config.data.sequence_length == 61440
    assert config.optimizer._target_ == "lightning_mst.in_backward.OptimizerInBackward"
    assert config.optimizer.lr == 1e-5


def test_the_optimizer_in_the_backward_pass_comes_without_clipping_unless_it_is_asked_for(compose_config):
    assert compose_config().trainer.gradient_clip_val == 1.0
    assert compose_config("optimizer=adamw_in_backward").trainer.gradient_clip_val is None
    asked_for = compose_config("optimizer=adamw_in_backward", "trainer.gradient_clip_val=2")
    assert asked_for.trainer.gradient_clip_val == 2


def test_lightnings_own_fsdp_cannot_clip_by_norm_and_ours_can():
    options = {"parallel_devices": [torch.device("cuda", 0)], "cluster_environment": LightningEnvironment()}
    trainer = SimpleNamespace(strategy=FSDPStrategy(**options), gradient_clip_val=1.0, gradient_clip_algorithm=None)

    with pytest.raises(ConfigurationError, match=r"strategy=mst_fsdp, which can, or trainer.gradient_clip_val=null"):
        check_strategy(trainer)
    trainer.gradient_clip_algorithm = "value"
    check_strategy(trainer)
    trainer.strategy, trainer.gradient_clip_algorithm = MSTFSDPStrategy(**options), "norm"
    check_strategy(trainer)
