"""Which lengths fit a device, and what fills it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer

from lightning_mst.configurations import conf_dir, names_of
from lightning_mst.memory.longest import LONGEST, SHORTEST, least_number, longest
from lightning_mst.memory.optimizers import make_optimizer
from lightning_mst.memory.passes import passes_of
from lightning_mst.memory.prediction import Prediction
from lightning_mst.memory.setting import Setting, Training
from lightning_mst.memory.sources import builder_of
from lightning_mst.models import check_positions, count_parameters, num_positions
from lightning_mst.rewrite.config import MSTConfig
from lightning_mst.units import GIB, in_words, parse_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

RUNGS = ("off", "recompute", "paper", "auto")
"""The settings of ``conf/mst`` that a plan compares: a ladder of ever longer sequences."""

_COUNTED = 2 * 61
"""Tokens of the step whose matmuls are counted; halves of it have no size that a weight would have."""


@dataclass(frozen=True)
class Rung:
    """How far one setting gets.

    Attributes:
        mst: its name in ``conf/mst``.
        config: the setting.
        max_length: the longest sequence that fits, in tokens; 0 if none does.
        prediction: the peak at that length, or ``None``.
        mlp_passes: what a step costs in the MLPs, in units of one forward pass's matmuls (3 without recomputation);
            ``nan`` for a model without MLPs in repeated layers.
        curve: the (length, bytes on the device) that were tried, in order.
    """

    mst: str
    config: MSTConfig
    max_length: int
    prediction: Prediction | None
    mlp_passes: float
    curve: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Wanted:
    """What it takes to train on sequences of a given length.

    Attributes:
        sequence_length: the length, in tokens.
        config: the smallest numbers of mini-sequences with which it fits, or ``None`` if it does not.
        prediction: the peak with them; or with as many mini-sequences as are of use.
    """

    sequence_length: int
    config: MSTConfig | None
    prediction: Prediction


@dataclass(frozen=True)
class Plan:
    """What fits a device.

    Attributes:
        model: the model's name.
        parameters: its number of weights.
        trainable_parameters: how many of them are trained.
        training: how it is trained.
        batch_size: B, sequences on each device.
        device_memory: bytes of each device.
        rungs: how far each setting gets.
        wanted: what a given length takes, if one was given.
        notes: what was modelled, and what else there is to know.
    """

    model: str
    parameters: int
    trainable_parameters: int
    training: Training
    batch_size: int
    device_memory: int
    rungs: tuple[Rung, ...]
    wanted: Wanted | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` writes; memory in GiB (2**30 bytes)."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "trainable_parameters": self.trainable_parameters,
            "device_memory_gib": self.device_memory / GIB,
            "batch_size": self.batch_size,
            "precision": self.training.precision,
            "strategy": self.training.strategy,
            "num_devices": self.training.num_devices,
            "accumulate_grad_batches": self.training.accumulate_grad_batches,
            "rungs": [
                {
                    "mst": rung.mst,
                    "max_length": rung.max_length,
                    **_memory_dict(rung.prediction),
                    "mlp_passes": None if math.isnan(rung.mlp_passes) else rung.mlp_passes,
                    "curve": [[length, size / GIB] for length, size in rung.curve],
                }
                for rung in self.rungs
            ],
            "wanted": self.wanted
            and {
                "sequence_length": self.wanted.sequence_length,
                "mlp_chunks": self.wanted.config and self.wanted.config.mlp_chunks,
                "lm_head_chunks": self.wanted.config and self.wanted.config.lm_head_chunks,
                "fits": self.wanted.config is not None,
                **_memory_dict(self.wanted.prediction),
            },
            "notes": list(self.notes),
        }


def _memory_dict(prediction: Prediction | None) -> dict[str, Any]:
    if prediction is None:
        return {"device_gib": None, "host_gib": None, "peak": None}
    return {
        "device_gib": {kind: size / GIB for kind, size in prediction.kinds.items()},
        "host_gib": prediction.host / GIB,
        "peak": peak_place(prediction),
    }


def peak_place(prediction: Prediction) -> str:
    """Where a peak is, for example ``"backward of layer 31, mlp"``."""
    return prediction.block if prediction.phase == "optimizer" else f"{prediction.phase} of {prediction.block}"


def plan(
    model: str | Path | PreTrainedConfig | nn.Module | Callable[[], nn.Module],
    *,
    device_memory: str | int = "80GiB",
    batch_size: int = 1,
    precision: str = "bf16-true",
    optimizer: str | Callable[[nn.Module], Optimizer | None] = "adamw",
    strategy: str = "single",
    num_devices: int = 1,
    accumulate_grad_batches: int = 1,
    sequence_length: int | None = None,
    mst: Sequence[str] = RUNGS,
    device: str = "cuda",
    prepare: Callable[[nn.Module], nn.Module] | None = None,
) -> Plan:
    """Predicts, without a GPU and without a weight in memory, how long sequences may be.

    The model itself, rewritten as it would be, runs a training step on fake tensors, with two and with three of its
    layers; as memory is linear in the number of equal layers, these two speak for all. Attention counts as the flash
    kernel of GPUs, whatever would run here. Not modelled: fragmentation, the libraries' own caches, other programs.

    Args:
        model: the name of a file of ``conf/model``; a local folder or a name on the Hugging Face hub (only the
            configuration is read); a transformers configuration; a function that builds a module; or a module.
        device_memory: of each device: ``"80GiB"`` (2**30 bytes each), ``"80GB"`` (10**9 each), or bytes.
        batch_size: B, sequences on each device.
        precision: Lightning's name: ``"bf16-true"``, ``"bf16-mixed"``, ``"32-true"``, ...
        optimizer: a name that ``memory.optimizers.make_optimizer`` knows, such as ``"adamw_in_backward"``, or a
            function from the model to its optimizer.
        strategy: ``"single"``, ``"ddp"``, ``"fsdp2"``, ``"zero2"`` or ``"zero3"``.
        num_devices: over how many devices.
        accumulate_grad_batches: batches for one step of the optimizer.
        sequence_length: a length that is wanted: finds the smallest numbers of mini-sequences that reach it.
        mst: settings of ``conf/mst`` to compare.
        device: the kind of device: ``"cuda"`` or ``"cpu"``.
        prepare: what is made of the model before it trains, such as adapters on quantized weights.

    Returns:
        The plan.

    Raises:
        ValueError: for a wrong name or number; ``TooLarge`` for a model too large for the device at any length.
        TypeError: for a model that is none of these.
    """
    budget = parse_bytes(device_memory)
    _check_number("batch_size", batch_size)
    if sequence_length is not None:
        _check_number("sequence_length", sequence_length, least=2)
    configs = {name: mst_setting(name) for name in mst}
    make = make_optimizer(optimizer) if isinstance(optimizer, str) else optimizer
    training = Training(
        precision=precision,
        make_optimizer=make,
        prepare=prepare or (lambda model: model),
        strategy=strategy,
        num_devices=num_devices,
        accumulate_grad_batches=accumulate_grad_batches,
        device=device,
    )
    if isinstance(model, nn.Module):
        name, setting = type(model).__name__, Setting(model, training)
    else:
        name, build = builder_of(model)
        setting = Setting(build, training)
    return plan_setting(name, setting, budget, configs, batch_size=batch_size, sequence_length=sequence_length)


def plan_setting(
    name: str,
    setting: Setting,
    budget: int,
    configs: dict[str, MSTConfig],
    *,
    batch_size: int = 1,
    sequence_length: int | None = None,
) -> Plan:
    """``plan`` for a model that is there.

    Args:
        name: what to call the model.
        setting: the model and its training.
        budget: bytes of each device.
        configs: the settings to compare, by name.
        batch_size: B.
        sequence_length: a length that is wanted.
    """
    if sequence_length is not None:
        check_positions(setting.model, sequence_length)
    rungs: list[Rung] = []
    for rung, config in configs.items():
        expected = max((before.max_length for before in rungs), default=0)
        rungs.append(_rung(setting, rung, config, budget, batch_size, expected))
    if not any(rung.max_length for rung in rungs):
        least = (setting.predict(config, SHORTEST, batch_size) for config in configs.values())
        raise _too_large(name, budget, min(least, key=lambda prediction: prediction.total))
    wanted = None
    if sequence_length is not None:
        wanted = smallest_chunks(setting, sequence_length, batch_size, budget, _base(configs))
    return Plan(
        model=name,
        parameters=count_parameters(setting.model),
        trainable_parameters=count_parameters(setting.model, trainable=True),
        training=setting.training,
        batch_size=batch_size,
        device_memory=budget,
        rungs=tuple(rungs),
        wanted=wanted,
        notes=tuple(_notes(setting)),
    )


def mst_setting(name: str) -> MSTConfig:
    """The config of a file of ``conf/mst``.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in names_of("mst"):
        raise ValueError(f"There is no conf/mst/{name}.yaml. Expected one of {', '.join(names_of('mst'))}.")
    return MSTConfig(**OmegaConf.to_container(OmegaConf.load(conf_dir() / "mst" / f"{name}.yaml")))  # type: ignore[arg-type]


def _check_number(name: str, value: object, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} should be a whole number, {least} or more; got {value!r}.")


def _rung(setting: Setting, name: str, config: MSTConfig, budget: int, batch_size: int, expected: int) -> Rung:
    predictions: dict[int, Prediction] = {}

    def total(length: int) -> int:
        predictions[length] = setting.predict(config, length, batch_size)
        return predictions[length].total

    limit = min(LONGEST, num_positions(setting.model) or LONGEST)
    found = longest(total, budget, limit=limit, expected=expected)
    if len(predictions) == 2:  # the curve is not straight between them: mini-sequences begin at some length
        total(math.isqrt(min(predictions) * max(predictions)))
    curve = tuple((length, predictions[length].total) for length in sorted(predictions))
    return Rung(name, config, found, predictions.get(found), _mlp_passes(setting, config), curve)


def _mlp_passes(setting: Setting, config: MSTConfig) -> float:
    """Two short mini-sequences cost what many long ones do in passes, and are counted in a second."""
    short = replace(config, mlp_chunks=config.mlp_chunks and 2, lm_head_chunks=None, lm_head_module=None)
    setting.rewrite(short)
    return passes_of(setting.model, setting.step(_COUNTED), setting.fake)


def smallest_chunks(
    setting: Setting, sequence_length: int, batch_size: int, budget: int, base: MSTConfig | None = None
) -> Wanted:
    """The smallest ``mlp_chunks`` and ``lm_head_chunks`` with which sequences of a length fit, all layers recomputed.

    Args:
        setting: the model and its training.
        sequence_length: S.
        batch_size: B.
        budget: bytes of the device.
        base: says which modules are MLPs and heads, if it is not left to discovery.
    """
    # Chunks of fewer tokens would bring next to nothing.
    most = max(1, sequence_length * batch_size // 256)
    tried: dict[tuple[int, int], Prediction] = {}

    def config(mlp: int, head: int) -> MSTConfig:
        return replace(base or MSTConfig(), mlp_chunks=mlp, lm_head_chunks=head, checkpoint_layers="all")

    def predicted(mlp: int, head: int) -> Prediction:
        if (mlp, head) not in tried:
            tried[mlp, head] = setting.predict(config(mlp, head), sequence_length, batch_size)
        return tried[mlp, head]

    if predicted(most, most).total > budget:
        return Wanted(sequence_length, None, predicted(most, most))
    mlp = least_number(lambda m: predicted(m, most).total, budget, most)
    head = least_number(lambda m: predicted(mlp, m).total, budget, most)
    return Wanted(sequence_length, config(mlp, head), predicted(mlp, head))


def _base(configs: dict[str, MSTConfig]) -> MSTConfig:
    """The config that names modules, if one does."""
    named = (c for c in configs.values() if c.mlp_modules is not None or c.lm_head_module is not None)
    return next(named, MSTConfig())


class TooLarge(ValueError):
    """The model does not fit the device, however short its sequences are."""


def _too_large(name: str, budget: int, least: Prediction) -> TooLarge:
    parts = ", ".join(
        f"{in_words(n)} of {kind.replace('_', ' ')}" for kind, n in least.kinds.items() if n >= least.total / 100
    )
    return TooLarge(
        f"{name} does not fit {in_words(budget)} at any length: {SHORTEST} tokens take {in_words(least.total)} "
        f"({parts})."
    )


def _notes(setting: Setting) -> list[str]:
    notes = []
    if setting.device.is_gpu:
        notes.append(
            "Attention is modelled as the flash kernel of GPUs, linear in the length, also with windows and soft-caps."
        )
    notes.append(f"Overhead of the device: {setting.device.source}. Fragmentation is not modelled.")
    return notes
