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
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from lightning_mst.causal_lm import CausalLM
from lightning_mst.data.cache import default_cache_dir
from lightning_mst.models import check_positions, check_vocabulary, count_parameters
from lightning_mst.ops.host_memory import NotEnoughHostMemory
from lightning_mst.program.allocator import release_freed_memory, unmap_freed_blocks
from lightning_mst.program.contexts import check_one_device, context_perplexity, read_context_lengths, take_tokens
from lightning_mst.program.environment import environment
from lightning_mst.program.errors import ConfigurationError, configuration_of
from lightning_mst.program.history import History
from lightning_mst.program.logs import quiet_lightning, tidy_lightning_output
from lightning_mst.program.optimizer import check_optimizer
from lightning_mst.program.own_process import needs_own_process, run_in_own_process
from lightning_mst.program.processes import ending_together, is_main_process, one_at_a_time, told_once
from lightning_mst.program.results import remove_result, write_result
from lightning_mst.program.strategy import build_strategy, check_strategy, strategy_name
from lightning_mst.program.tables import print_summary

__all__ = ["labels", "train"]


def train(config: DictConfig) -> dict[str, Any]:
    """Train, validate, print a summary, and write ``result.json`` into ``config.output_dir``.

    1. Read the data, which decides the vocabulary.
    2. Build trainer and model, the model in the trainer's dtype and on its device; quantize it and add adapters, if
       the configuration says so.
    3. Fit; then, with ``config.validate``, the perplexity of the held-out text, and with ``task.context_lengths`` that
       against the length of the context.

    Args:
        config: As composed from ``conf/config.yaml``.

    Returns:
        What ``result.json`` holds: ``status``, ``loss`` (of the last step), ``losses`` (one per step of this run),
        ``val_perplexity``, ``val_loss``, ``context_perplexity`` (context length -> perplexity), ``tokens_per_second``,
        ``seconds_per_step`` (median of all but the first), ``peak_memory_gib`` (the highest of all steps),
        ``peak_memory_where`` (in its step: phase, layer and block, in the main process),
        ``steps``, ``sequence_length``, ``batch_size`` (per device), ``parameters``, ``trainable_parameters``,
        ``model``, ``mst`` (its settings), ``mst_name``, ``precision``, ``strategy``, ``devices`` (of all machines),
        ``quantization``, ``adapter``, ``seed`` and what ``labels`` says. Losses, perplexity and speed are those of
        all devices together, the peak is that of the fullest. What was not measured is None. A run that fails leaves
        ``status`` (``"failed"``), ``error`` and the ``rank`` it happened to.

    Raises:
        ConfigurationError: A value is missing, unknown or does not go with another one.
        RankFailed: Another process of the run failed, which has said why.
        JobFailed: The same of a process that a sweep started for this run.
    """
    folder = Path(config.output_dir)
    if is_main_process():
        remove_result(folder)
    tidy_lightning_output()
    with told_once(folder):
        check_config(config)
        own_process = starts_runs() and starts_processes(config)
    if own_process:
        return run_in_own_process(folder)
    with told_once(folder):
        result = run(config) | labels(config)
    if is_main_process():
        write_result(folder, result)
        if not is_sweep():  # a sweep shows one table of all its runs
            print_summary(result, folder)
    return result


def labels(config: DictConfig) -> dict[str, Any]:
    """What every result says of its run: which task of which experiment, and where, with what and when.

    For when the work is done: asking a GPU for its name wakes it up in this process, before others can be forked.

    Args:
        config: As composed from ``conf/config.yaml``.

    Returns:
        ``task``, ``experiment`` (the name of its file, such as ``"smoke/lm_head"``, or None), ``device``, ``versions``
        and ``date``.
    """
    return {"task": config.task.name, "experiment": choice("experiment"), **environment()}


def run(config: DictConfig) -> dict[str, Any]:
    """Train and validate in this process and those that the strategy starts; see :func:`train`."""
    unmap_freed_blocks()
    release_freed_memory()
    pl.seed_everything(config.seed, workers=True, verbose=False)
    recipe = build_recipe(config)
    history = History()
    trainer = build_trainer(config, history)
    check_optimizer(recipe.optimizer, trainer)
    context_lengths = read_context_lengths(config)
    if context_lengths:
        check_one_device(trainer)

    with configuration_of("data"):
        datamodule = build(config.data)
        # Not the trainer's task, as the model needs the vocabulary: of several processes, the first fills the caches.
        with one_at_a_time(Path(config.data.get("cache_dir") or default_cache_dir())):
            datamodule.prepare_data()
        datamodule.setup("fit")
    if context_lengths:
        held_out = take_tokens(datamodule.validation_dataset.tokens, context_lengths, config.task.context_tokens)
    module = build_module(config, trainer, datamodule.vocab_size, recipe)
    # Counted while each process has all weights.
    parameters, trainable = count_parameters(module.model), count_parameters(module.model, trainable=True)

    validation: dict[str, Any] = {}
    with ending_together(trainer, Path(config.output_dir)):
        try:
            trainer.fit(module, datamodule=datamodule, ckpt_path=config.ckpt_path)
        except (ValueError, MisconfigurationException, NotEnoughHostMemory) as error:
            if history.started:
                raise
            # Callbacks and strategies find wrong settings only now that they see the model.
            raise ConfigurationError(str(error)) from error
        if not history.started:  # it was a copy in a process that Lightning has spawned
            history.take_over(trainer)
            trainer.loggers = []  # where the next processes would begin the same files anew
        if config.validate:
            validated = trainer.validate(module, datamodule=datamodule, verbose=False)
            validation = validated[0] if validated else {}  # empty with trainer.limit_val_batches=0
        contexts = context_perplexity(trainer, module, held_out, context_lengths) if context_lengths else None

    losses = history.losses
    return {
        "status": "completed",
        "loss": losses[-1] if losses else None,
        "val_perplexity": validation.get("val_perplexity"),
        "val_loss": validation.get("val_loss"),
        "context_perplexity": contexts,
        "tokens_per_second": history.tokens_per_second,
        "seconds_per_step": history.seconds_per_step,
        "peak_memory_gib": history.peak_memory_gib,
        "peak_memory_where": history.peak_memory_where,
        "steps": history.steps,
        "sequence_length": config.data.sequence_length,
        "batch_size": config.data.batch_size,
        "parameters": parameters,
        "trainable_parameters": trainable,
        "model": choice("model"),
        "mst_name": choice("mst"),
        "mst": OmegaConf.to_container(config.mst, resolve=True),
        "precision": str(config.trainer.precision),
        "strategy": strategy_name(config.trainer.get("strategy")),
        "devices": trainer.world_size,
        "quantization": choice("quantization") if config.quantization else None,
        "adapter": choice("adapter") if config.adapter else None,
        "seed": config.seed,
        "losses": losses,
    }


def check_config(config: DictConfig) -> None:
    """Find what can be told to be wrong before anything is built.

    Raises:
        ConfigurationError: A mandatory value is missing, a number makes no sense, or the checkpoint to go on from is
            not there.
    """
    missing = missing_keys(OmegaConf.to_container(config, resolve=False))
    if missing:
        values = " ".join(f"{key}=..." for key in missing)
        raise ConfigurationError(f"Missing: {', '.join(missing)}. Say, for example, {values}")
    for key, least in (("data.sequence_length", 2), ("data.batch_size", 1)):
        value = OmegaConf.select(config, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigurationError(f"{key} should be a whole number, {least} or more, got {value!r}")
    with configuration_of("ckpt_path"):
        if config.ckpt_path is not None and not get_filesystem(config.ckpt_path).exists(config.ckpt_path):
            raise ConfigurationError(f"ckpt_path: There is no checkpoint {config.ckpt_path!r}, neither file nor folder")


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
    trainer = build_bare_trainer(config, **options)
    check_strategy(trainer)
    return trainer


def build_bare_trainer(config: DictConfig, **options: Any) -> pl.Trainer:
    """A trainer with no more than these options and those of the configuration; it has not started anything yet.

    Raises:
        ConfigurationError: There is no such strategy, it does not go with the precision, ...
    """
    with configuration_of("strategy"):
        strategy = build_strategy(config.trainer.get("strategy"))
    with configuration_of("trainer"):
        return build(config.trainer, **{"logger": False, **options}, strategy=strategy)


def starts_processes(config: DictConfig) -> bool:
    """Whether the run will have processes of its own; see :func:`needs_own_process`."""
    with quiet_lightning():
        return needs_own_process(build_bare_trainer(config))


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
        check_positions(model, max(config.data.sequence_length, *read_context_lengths(config), 0))
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


def starts_runs() -> bool:
    """Whether this process runs a sweep, all jobs of it."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def is_sweep() -> bool:
    """Whether this run is one of several that a sweep starts: Hydra numbers those, in a process of their own, too."""
    return HydraConfig.initialized() and not OmegaConf.is_missing(HydraConfig.get().job, "num")
