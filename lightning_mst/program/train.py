"""One training run, from a composed configuration to a dictionary of results."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from lightning_mst.causal_lm import CausalLM
from lightning_mst.models import check_positions, check_vocabulary, count_parameters
from lightning_mst.program.allocator import release_freed_memory, unmap_freed_blocks
from lightning_mst.program.errors import ConfigurationError, configuration_of
from lightning_mst.program.history import History
from lightning_mst.program.logs import tidy_lightning_output
from lightning_mst.program.results import remove_result, write_result
from lightning_mst.program.tables import print_summary

__all__ = ["train"]


def train(config: DictConfig) -> dict[str, Any]:
    """Train, validate, print a summary, and write ``result.json`` into ``config.output_dir``.

    1. Read the data, which decides the vocabulary.
    2. Build trainer and model, the model in the trainer's dtype and on its device; quantize it and add adapters, if
       the configuration says so.
    3. Fit; then, with ``config.validate``, the perplexity of the held-out text.

    Args:
        config: As composed from ``conf/config.yaml``.

    Returns:
        What ``result.json`` holds: ``status``, ``loss`` (of the last step), ``losses`` (one per step),
        ``val_perplexity``, ``val_loss``, ``tokens_per_second``, ``peak_memory_gib`` (the highest of all steps),
        ``steps``, ``sequence_length``, ``batch_size``, ``parameters``, ``trainable_parameters``, ``model``, ``mst``
        (its settings), ``mst_name``, ``precision``, ``quantization``, ``adapter`` and ``seed``. What was not measured
        is None.

    Raises:
        ConfigurationError: A value is missing, unknown or does not go with another one.
    """
    remove_result(Path(config.output_dir))
    check_config(config)
    tidy_lightning_output()
    unmap_freed_blocks()
    release_freed_memory()
    pl.seed_everything(config.seed, workers=True, verbose=False)
    recipe = build_recipe(config)

    with configuration_of("data"):
        datamodule = build(config.data)
        datamodule.prepare_data()
        datamodule.setup("fit")

    history = History()
    trainer = build_trainer(config, history)
    module = build_module(config, trainer, datamodule.vocab_size, recipe)

    try:
        trainer.fit(module, datamodule=datamodule)
    except (ValueError, MisconfigurationException) as error:
        if history.started:
            raise
        # Callbacks and strategies find wrong settings only now that they see the model.
        raise ConfigurationError(str(error)) from error
    validation: dict[str, Any] = {}
    if config.validate:
        validated = trainer.validate(module, datamodule=datamodule, verbose=False)
        validation = validated[0] if validated else {}  # empty with trainer.limit_val_batches=0

    losses = history.losses
    result = {
        "status": "completed",
        "loss": losses[-1] if losses else None,
        "val_perplexity": validation.get("val_perplexity"),
        "val_loss": validation.get("val_loss"),
        "tokens_per_second": history.tokens_per_second,
        "peak_memory_gib": history.peak_memory_gib,
        "steps": trainer.global_step,
        "sequence_length": config.data.sequence_length,
        "batch_size": config.data.batch_size,
        "parameters": count_parameters(module.model),
        "trainable_parameters": count_parameters(module.model, trainable=True),
        "model": choice("model"),
        "mst_name": choice("mst"),
        "mst": OmegaConf.to_container(config.mst, resolve=True),
        "precision": str(config.trainer.precision),
        "quantization": choice("quantization") if config.quantization else None,
        "adapter": choice("adapter") if config.adapter else None,
        "seed": config.seed,
        "losses": losses,
    }
    if trainer.is_global_zero:
        write_result(Path(config.output_dir), result)
        if not is_sweep():  # a sweep shows one table of all its runs
            print_summary(result, Path(config.output_dir))
    return result


def check_config(config: DictConfig) -> None:
    """Find what can be told to be wrong before anything is built.

    Raises:
        ConfigurationError: A mandatory value is missing, or a number makes no sense.
    """
    missing = missing_keys(OmegaConf.to_container(config, resolve=False))
    if missing:
        values = " ".join(f"{key}=..." for key in missing)
        raise ConfigurationError(f"Missing: {', '.join(missing)}. Say, for example, {values}")
    for key, least in (("data.sequence_length", 2), ("data.batch_size", 1)):
        value = OmegaConf.select(config, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigurationError(f"{key} should be a whole number, {least} or more, got {value!r}")


def missing_keys(value: Any, key: str = "") -> list[str]:
    """The full keys of all mandatory values (``???``) that nobody has given.

    Unlike OmegaConf's own function it follows no interpolations, one of which may lead to a missing value.
    """
    if value == "???":
        return [key]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for name, item in items for found in missing_keys(item, f"{key}.{name}" if key else str(name))]


@dataclass(frozen=True)
class Recipe:
    """What is made of a model before it trains, and how its trainable parameters are stepped.

    Attributes:
        quantize: Freezes and quantizes a model in place, on ``device=...``.
        adapter: A PEFT configuration.
        optimizer: Parameters -> optimizer.
        scheduler: Optimizer -> learning rate scheduler.
    """

    quantize: Callable[..., nn.Module] | None
    adapter: Any
    optimizer: Callable[..., Any]
    scheduler: Callable[..., Any] | None


def build_recipe(config: DictConfig) -> Recipe:
    """All that needs neither data nor model, so that a missing package or a wrong value shows before any work.

    Raises:
        ConfigurationError: Something in it can't be built, or quantized weights come without an adapter.
    """
    if config.quantization and not config.adapter:
        raise ConfigurationError(
            "quantization: Quantized weights are frozen, so that nothing would be trained. Add an adapter"
            " (adapter=lora), or drop the quantization (quantization=none)"
        )
    made: dict[str, Any] = {}
    for group in ("quantization", "adapter", "optimizer", "scheduler"):
        with configuration_of(group):
            made[group] = build(config[group]) if config[group] else None
    return Recipe(made["quantization"], made["adapter"], made["optimizer"], made["scheduler"])


def build_trainer(config: DictConfig, history: History) -> pl.Trainer:
    """The trainer, with the callbacks and loggers of the configuration and the history as the last callback.

    A progress bar is for a terminal: elsewhere (a log file, a comparison's processes) the history logs lines instead.
    """
    with configuration_of("callbacks"):
        callbacks = [build(callback) for callback in (config.callbacks or {}).values() if callback]
    with configuration_of("logger"):
        loggers = [build(logger) for logger in (config.logger or {}).values() if logger]
    if not sys.stdout.isatty():
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    options = {
        "callbacks": [*callbacks, history],
        "logger": loggers or False,
        "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in callbacks),
    }
    with configuration_of("trainer"):
        trainer = build(config.trainer, **options)
    if is_sweep() and trainer.world_size > 1 and trainer.strategy.launcher is not None:
        # Lightning starts the other processes with this command line, so that each would start the whole sweep.
        raise ConfigurationError("trainer: A sweep trains on one device per run; set trainer.devices=1")
    return trainer


def build_module(config: DictConfig, trainer: pl.Trainer, vocab_size: int, recipe: Recipe) -> CausalLM:
    """The LightningModule, its weights on the trainer's device and in its dtype.

    Args:
        config: The whole configuration.
        trainer: Decides the device and the dtype.
        vocab_size: Entries of the data's tokenizer: what ``model.config.vocab_size=null`` stands for.
        recipe: What is made of the model.
    """
    model_config = copy.deepcopy(config.model)
    architecture = model_config.get("config")
    if architecture is not None and architecture.get("vocab_size", 0) is None:
        with open_dict(architecture):
            architecture.vocab_size = vocab_size
    with configuration_of("model"), trainer.init_module():
        model: nn.Module = build(model_config)
    with configuration_of("data"):
        check_vocabulary(model, vocab_size)
        check_positions(model, config.data.sequence_length)
    if recipe.quantize is not None:
        with configuration_of("quantization"):
            model = recipe.quantize(model, device=trainer.strategy.root_device)
    if recipe.adapter is not None:
        from peft import get_peft_model

        with configuration_of("adapter"), trainer.init_module():
            model = get_peft_model(model, recipe.adapter)
    return CausalLM(model, optimizer=recipe.optimizer, scheduler=recipe.scheduler)


def build(config: DictConfig, **options: Any) -> Any:
    """What ``_target_`` names, made with plain lists and dictionaries: strict constructors refuse OmegaConf's."""
    return instantiate(config, _convert_="all", **options)


def choice(group: str) -> str | None:
    """Name of the file that was picked in a Hydra group, or None outside a Hydra program."""
    return HydraConfig.get().runtime.choices.get(group) if HydraConfig.initialized() else None


def is_sweep() -> bool:
    """Whether this run is one of several that a sweep starts."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
