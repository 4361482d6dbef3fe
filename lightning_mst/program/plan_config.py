"""From a training run's configuration to what the planner takes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_mst.configurations import conf_dir
from lightning_mst.memory.moving import fake_modules_move
from lightning_mst.memory.quantized import quantize_fake
from lightning_mst.memory.setting import Training
from lightning_mst.memory.sources import check_fields
from lightning_mst.models import from_config
from lightning_mst.program.errors import ConfigurationError, configuration_of
from lightning_mst.program.optimizer import check_planned_optimizer
from lightning_mst.program.strategy import build_strategy
from lightning_mst.program.train import Recipe, build, build_recipe, missing_keys
from lightning_mst.rewrite.config import MSTConfig

__all__ = ["Run", "compose_runs", "mst_config", "read_run", "total_memory"]

_PRECISIONS = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Lightning's short names."""


@dataclass(frozen=True)
class Run:
    """A training run, as far as its memory goes.

    Attributes:
        model: What to call the model.
        build_model: Builds it, with random weights.
        training: How it is trained.
        batch_size: B, sequences on each device.
        sequence_length: S of the configuration, in tokens.
        choices: The names that were picked in Hydra's groups.
        quantization: Of the frozen weights, or None.
        adapter: What is trained in place of the weights, or None.
    """

    model: str
    build_model: Callable[[], nn.Module]
    training: Training
    batch_size: int
    sequence_length: int
    choices: dict[str, Any]
    quantization: str | None
    adapter: str | None

    def as_dict(self) -> dict[str, Any]:
        """What a report says beside the plan."""
        return {
            "optimizer": self.choices.get("optimizer"),
            "quantization": self.quantization,
            "adapter": self.adapter,
        }

    def smaller(self) -> str:
        """What could be asked for to need less memory."""
        offers = []
        if self.quantization is None:
            if self.training.precision in ("32-true", "64-true", "bf16-mixed", "16-mixed"):
                offers.append("precision=bf16-true")
            if not str(self.choices.get("optimizer")).endswith("_in_backward") and self.adapter is None:
                offers.append("optimizer=adamw_in_backward")
        both = [" ".join(offers)] if offers else []
        if self.quantization is None:
            both.append("precision=nf4-lora")
        if self.training.strategy in ("single", "ddp"):
            both.append(f"strategy=mst_model_parallel trainer.devices={max(8, self.training.num_devices)}")
        else:
            both.append(f"trainer.devices={2 * self.training.num_devices}")
        return "Add " + ", or ".join(both) + ", or say --memory for a larger device."


def compose_runs(settings: Sequence[str], overrides: Sequence[str]) -> dict[str, DictConfig]:
    """The configuration that ``train`` would compose, under each mini-sequence setting.

    Args:
        settings: Names of files of the ``mst`` group.
        overrides: Hydra's, as for ``train``.

    Returns:
        Setting -> configuration, with Hydra's own under ``hydra``.
    """
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        return {
            setting: compose("config", overrides=[*overrides, f"mst={setting}"], return_hydra_config=True)
            for setting in settings
        }


def mst_config(config: DictConfig) -> MSTConfig:
    """The mini-sequence setting of a configuration."""
    with configuration_of("mst"):
        planned = MSTConfig(**OmegaConf.to_container(config.mst, resolve=True))  # type: ignore[arg-type]
    if planned.checkpoint_layers == "auto":
        raise ConfigurationError(
            "mst: checkpoint_layers='auto' (as in mst=fit) recomputes what a given length requires, up to all layers:"
            " its longest sequence is that of --mst auto. Plan that"
        )
    return planned


def read_run(config: DictConfig, *, layers: int | None = None) -> Run:
    """What is to be planned.

    Args:
        config: As :func:`compose_runs` makes it.
        layers: Build at most so many layers of the model, where its configuration says how many it has.

    Raises:
        ConfigurationError: A value is missing, unknown, or of no use to a plan.
    """
    missing = missing_keys(OmegaConf.to_container(config.model, resolve=False), "model")
    if missing:
        raise ConfigurationError(f"Missing: {', '.join(missing)}. Say, for example, {missing[0]}=...")
    for key, least in (("data.sequence_length", 2), ("data.batch_size", 1), ("trainer.accumulate_grad_batches", 1)):
        value = OmegaConf.select(config, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigurationError(f"{key} should be a whole number, {least} or more, got {value!r}")
    recipe = build_recipe(config)
    strategy, num_devices = strategy_of(config)
    precision = str(config.trainer.get("precision") or "32-true")
    with configuration_of("trainer.precision"):
        training = Training(
            precision=_PRECISIONS.get(precision, precision),
            make_optimizer=optimizer_of(recipe),
            prepare=preparation_of(recipe, config.quantization and config.quantization.weights),
            strategy=strategy,
            num_devices=num_devices,
            accumulate_grad_batches=config.trainer.accumulate_grad_batches,
            device="cpu" if config.trainer.get("accelerator") == "cpu" else "cuda",
        )
    check_planned_optimizer(recipe.optimizer, strategy, training.accumulate_grad_batches, training.device)
    choices = dict(config.hydra.runtime.choices)
    name, build_model = model_of(config, choices.get("model"), layers)
    return Run(
        name, build_model, training, config.data.batch_size, config.data.sequence_length, choices,
        quantization=choices.get("quantization") if config.quantization else None,
        adapter=choices.get("adapter") if config.adapter else None,
    )  # fmt: skip


def model_of(config: DictConfig, choice: str | None, layers: int | None) -> tuple[str, Callable[[], nn.Module]]:
    """A model's name, and a function that builds it with random weights, whatever the run would load."""
    node = copy.deepcopy(config.model)
    if str(node.get("_target_")).endswith(".from_pretrained"):
        return str(node.name), _untrained(node, layers)
    architecture = node.get("config")
    with open_dict(node):
        if architecture is not None and architecture.get("vocab_size", 0) is None:
            architecture.vocab_size = config.data.vocab_size
        if layers is not None and architecture is not None and architecture.get("num_hidden_layers"):
            architecture.num_hidden_layers = min(layers, architecture.num_hidden_layers)

    def build_model() -> nn.Module:
        with configuration_of("model"):
            return build(node)

    return str(choice or node.get("_target_")), build_model


def _untrained(node: DictConfig, layers: int | None) -> Callable[[], nn.Module]:
    """Builds what ``from_pretrained`` would load, with random weights: only the configuration is read."""
    from transformers import AutoConfig

    source = {"revision": node.get("revision") or "main", "trust_remote_code": bool(node.get("trust_remote_code"))}
    with configuration_of("model"):
        if not source["trust_remote_code"]:  # others may call their sizes what they like
            check_fields(node.name, revision=node.get("revision"))
        architecture = AutoConfig.from_pretrained(node.name, **source)
        if layers is not None and layers < getattr(architecture, "num_hidden_layers", 0):
            fewer = {"num_hidden_layers": layers}
            if getattr(architecture, "layer_types", None):
                fewer["layer_types"] = architecture.layer_types[:layers]
            architecture = AutoConfig.from_pretrained(node.name, **source, **fewer)

    def build_model() -> nn.Module:
        with configuration_of("model"):
            return from_config(
                architecture,
                attn_implementation=node.get("attn_implementation", "sdpa"),
                dtype=node.get("dtype"),
            )

    return build_model


def preparation_of(recipe: Recipe, weights: str | None) -> Callable[[nn.Module], nn.Module]:
    """What ``train`` makes of a model before it trains; works on fake weights as well.

    Args:
        recipe: The recipe.
        weights: What it quantizes them to, or None.
    """

    def prepare(model: nn.Module) -> nn.Module:
        is_fake = any(isinstance(parameter, FakeTensor) for parameter in model.parameters())
        if recipe.quantize is not None:
            with configuration_of("quantization"):
                model = quantize_fake(model, str(weights)) if is_fake else recipe.quantize(model)
        if recipe.adapter is not None:
            from peft import get_peft_model

            with configuration_of("adapter"), fake_modules_move() if is_fake else nullcontext():
                model = get_peft_model(model, recipe.adapter)
        return model

    return prepare


def optimizer_of(recipe: Recipe) -> Callable[[nn.Module], Any]:
    """Makes the optimizer of a model's trainable parameters."""

    def make(model: nn.Module) -> Any:
        with configuration_of("optimizer"):
            return recipe.optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])

    return make


def strategy_of(config: DictConfig) -> tuple[str, int]:
    """The planner's name of a strategy, and over how many devices it goes.

    Raises:
        ConfigurationError: There is no such strategy, or none that a plan can be made for.
    """
    num_devices = device_count(config.trainer.get("devices")) * int(config.trainer.get("num_nodes", 1))
    choice = config.trainer.get("strategy")
    if not choice or choice == "auto":
        return ("single" if num_devices == 1 else "ddp"), num_devices
    with configuration_of("strategy"):
        kind, options = _class_of(choice)
    name = _planned_as(kind, options)
    if name is None:
        raise ConfigurationError(
            "strategy: A plan can be made for one device, DDP, FSDP, DeepSpeed's stages 2 and 3, and stage 3 with"
            f" weights and optimizer states on the host; got {kind.__name__} with {options or 'no options'}"
        )
    if name == "single" and num_devices > 1:
        raise ConfigurationError(f"strategy: {kind.__name__} is for one device, got {num_devices}")
    return name, num_devices


def _class_of(choice: DictConfig | str) -> tuple[type, dict[str, Any]]:
    """A strategy's class and its options, without making one: that may need the devices."""
    if isinstance(choice, str):
        build_strategy(choice)  # knows the names, and what else a wrong one may have meant
        if "." in choice:
            return get_class(choice), {}
        entry = StrategyRegistry[choice.lower()]
        return entry["strategy"], dict(entry["init_params"])
    options = OmegaConf.to_container(choice, resolve=True)
    assert isinstance(options, dict)
    return get_class(options.pop("_target_")), {str(key): value for key, value in options.items()}


def _planned_as(kind: type, options: dict[str, Any]) -> str | None:
    offloaded = {key for key, value in options.items() if value and "offload" in key}
    if offloaded:
        whole = issubclass(kind, DeepSpeedStrategy) and options.get("stage") == 3
        return "zero3_offload" if whole and offloaded == {"offload_optimizer", "offload_parameters"} else None
    if issubclass(kind, DeepSpeedStrategy):  # a kind of DDPStrategy
        return {2: "zero2", 3: "zero3"}.get(options.get("stage", 2))
    if issubclass(kind, FSDPStrategy):
        shards = str(options.get("sharding_strategy", "FULL_SHARD"))
        return {"FULL_SHARD": "fsdp2", "SHARD_GRAD_OP": "zero2", "NO_SHARD": "ddp"}.get(shards)
    if issubclass(kind, ModelParallelStrategy):
        return "fsdp2" if options.get("tensor_parallel_size", 1) in (1, "auto") else None
    if issubclass(kind, DDPStrategy):
        return "ddp"
    return "single" if issubclass(kind, SingleDeviceStrategy) else None


def device_count(devices: Any) -> int:
    """How many devices ``trainer.devices`` stands for."""
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, int) and not isinstance(devices, bool) and devices >= 1:
        return devices
    if OmegaConf.is_list(devices) and len(devices):
        return len(devices)
    if devices in ("auto", -1, None):
        return max(1, torch.cuda.device_count())
    raise ConfigurationError(f"trainer.devices should be a number, a list, or 'auto', got {devices!r}")


def total_memory(device: str) -> tuple[int, str] | None:
    """The memory of the device that is there, with its name; ``None`` if there is none of the kind."""
    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return int(properties.total_memory), str(properties.name)
    return None
