"""The run whose steps an experiment measures, or predicts."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from lightning_mst.memory.prediction import Prediction
from lightning_mst.memory.setting import Setting
from lightning_mst.program.errors import ConfigurationError, configuration_of
from lightning_mst.program.plan_config import Run, mst_config, read_run
from lightning_mst.rewrite.config import MSTConfig

__all__ = ["How", "Subject", "read_subject"]

How = Literal["measured", "predicted"]


@dataclass(frozen=True)
class Subject:
    """What an experiment is about.

    Attributes:
        run: The model and how it is trained.
        mst: The form of the model.
        how: Whether real steps are measured, or steps on fake tensors predicted.
        device: Where real steps run.
        labels: What a result says of the run: ``model``, ``layers``, ``shrink``, ``mst_name``, ``mst``, ``precision``,
            ``optimizer``, ``quantization``, ``adapter`` and ``accumulate_grad_batches``.
    """

    run: Run
    mst: MSTConfig
    how: How
    device: torch.device
    labels: dict[str, Any]

    @cached_property
    def setting(self) -> Setting:
        """The model on fake tensors."""
        return Setting(self.run.build_model, self.run.training)

    def predict(self, batch_size: int, sequence_length: int) -> Prediction:
        """The predicted peak of a step on a batch (B, S)."""
        return self.setting.predict(self.mst, sequence_length, batch_size)


def read_subject(config: DictConfig) -> Subject:
    """What a task's configuration asks for.

    Args:
        config: As composed from ``conf/config.yaml``, with ``task.how``: ``"measured"``, ``"predicted"``, or ``"auto"``
            for what can be done here.

    Raises:
        ConfigurationError: A value is missing or unknown, the run has several devices, or is to be measured on a GPU
            that is not there.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of weights without values
    config = _with_choices(config)
    wants_gpu = config.trainer.get("accelerator") != "cpu"
    how = _how(config.task.how, wants_gpu=wants_gpu)
    device = torch.device("cuda" if wants_gpu else "cpu")
    if how == "measured" and not wants_gpu and config.model.get("attn_implementation") == "flex_attention":
        # torch has no backward pass of flex attention for CPUs.
        config.model.attn_implementation = "eager"
    mst = mst_config(config)
    run = read_run(config)
    if run.training.num_devices > 1:
        raise ConfigurationError(
            f"trainer.devices: task={config.task.name} runs on one device, got {run.training.num_devices}."
            " Set trainer.devices=1"
        )
    run = replace(run, training=replace(run.training, strategy="single"))
    labels = {
        "model": run.model,
        "layers": OmegaConf.select(config, "model.config.num_hidden_layers"),
        "shrink": OmegaConf.select(config, "model.shrink"),
        "mst_name": run.choices.get("mst"),
        "mst": OmegaConf.to_container(config.mst, resolve=True),
        "precision": str(config.trainer.precision),
        **run.as_dict(),
        "accumulate_grad_batches": run.training.accumulate_grad_batches,
    }
    return Subject(run, mst, how, device, labels)


def _with_choices(config: DictConfig) -> DictConfig:
    """A copy of the configuration that has the names of what was picked in Hydra's groups."""
    config = copy.deepcopy(config)
    with open_dict(config):
        config.hydra = {"runtime": {"choices": HydraConfig.get().runtime.choices}}
    return config


def _how(asked: str, *, wants_gpu: bool) -> How:
    if asked == "auto":
        return "measured" if wants_gpu and torch.cuda.is_available() else "predicted"
    with configuration_of("task.how"):
        if asked not in get_args(How):
            raise ValueError(f"should be auto, {' or '.join(get_args(How))}, got {asked!r}")
        if asked == "measured" and wants_gpu and not torch.cuda.is_available():
            raise ValueError("No GPU was found to measure on. Add trainer=cpu, or set task.how=predicted")
    return "measured" if asked == "measured" else "predicted"
