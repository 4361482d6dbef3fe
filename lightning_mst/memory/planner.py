"""Which lengths fit a device, and what fills it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer

from lightning_mst.configurations import conf_dir, names_of
from lightning_mst.memory.longest import SHORTEST, least_number
from lightning_mst.memory.optimizers import make_optimizer
from lightning_mst.memory.passes import Passes
from lightning_mst.memory.prediction import Prediction
from lightning_mst.memory.rungs import LADDER, RUNGS, Rung, Search, with_optimizer_on_host
from lightning_mst.memory.setting import Setting, Training
from lightning_mst.memory.sources import builder_of
from lightning_mst.models import check_positions, count_parameters
from lightning_mst.rewrite.config import MSTConfig
from lightning_mst.units import GIB, in_words, parse_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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
        host_memory: bytes of the host's memory for each device, or ``None`` where nothing limits them.
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
    host_memory: int | None
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
            "host_memory_gib": self.host_memory and self.host_memory / GIB,
            "batch_size": self.batch_size,
            "precision": self.training.precision,
            "strategy": self.training.strategy,
            "num_devices": self.training.num_devices,
            "accumulate_grad_batches": self.training.accumulate_grad_batches,
            "rungs": [
                {
                    "mst": rung.mst,
                    "optimizer": rung.optimizer,
                    "max_length": rung.max_length,
                    **_memory_dict(rung.prediction),
                    **_passes_dict(rung.passes),
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


def _passes_dict(passes: Passes) -> dict[str, float | None]:
    return {f"{part}_passes": None if math.isnan(number) else number for part, number in asdict(passes).items()}


def peak_place(prediction: Prediction) -> str:
    """Where a peak is, for example ``"backward of layer 31, mlp"``."""
    return prediction.block if prediction.phase == "optimizer" else f"{prediction.phase} of {prediction.block}"


def plan(
    model: str | Path | PreTrainedConfig | nn.Module | Callable[[], nn.Module],
    *,
    device_memory: str | int = "80GiB",
    host_memory: str | int | None = None,
    batch_size: int = 1,
    precision: str = "bf16-true",
    optimizer: str | Callable[[nn.Module], Optimizer | None] = "adamw",
    strategy: str = "single",
    num_devices: int = 1,
    accumulate_grad_batches: int = 1,
    sequence_length: int | None = None,
    mst: Sequence[str] = RUNGS,
    ladder: bool = False,
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
        host_memory: the host's for each device, in the same form. Default: not limited, only stated.
        batch_size: B, sequences on each device.
        precision: Lightning's name: ``"bf16-true"``, ``"bf16-mixed"``, ``"32-true"``, ...
        optimizer: a name that ``memory.optimizers.make_optimizer`` knows, such as ``"adamw_in_backward"``, or a
            function from the model to its optimizer.
        strategy: ``"single"``, ``"ddp"``, ``"fsdp2"``, ``"zero2"`` or ``"zero3"``.
        num_devices: over how many devices.
        accumulate_grad_batches: batches for one step of the optimizer.
        sequence_length: a length that is wanted: finds the smallest numbers of mini-sequences that reach it.
        mst: settings of ``conf/mst`` to compare.
        ladder: compare those of ``LADDER`` instead, and the last of them once more with the optimizer on the host.
        device: the kind of device: ``"cuda"`` or ``"cpu"``.
        prepare: what is made of the model before it trains, such as adapters on quantized weights.

    Returns:
        The plan.

    Raises:
        ValueError: for a wrong name or number; ``TooLarge`` for a model too large for the device at any length.
        TypeError: for a model that is none of these.
    """
    budget = parse_bytes(device_memory)
    host = None if host_memory is None else parse_bytes(host_memory)
    _check_number("batch_size", batch_size)
    if sequence_length is not None:
        _check_number("sequence_length", sequence_length, least=2)
    configs = {name: mst_setting(name) for name in (LADDER if ladder else mst)}
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
    name, source = (type(model).__name__, model) if isinstance(model, nn.Module) else builder_of(model)
    return plan_setting(
        name,
        Setting(source, training),
        budget,
        configs,
        host_memory=host,
        batch_size=batch_size,
        sequence_length=sequence_length,
        on_host=with_optimizer_on_host(source, training) if ladder else None,
    )


def plan_setting(
    name: str,
    setting: Setting,
    budget: int,
    configs: dict[str, MSTConfig],
    *,
    host_memory: int | None = None,
    batch_size: int = 1,
    sequence_length: int | None = None,
    on_host: tuple[str, Setting] | None = None,
) -> Plan:
    """``plan`` for a model that is there.

    Args:
        name: what to call the model.
        setting: the model and its training.
        budget: bytes of each device.
        configs: the settings to compare, by name.
        host_memory: bytes of the host's memory for each device, if they are limited.
        batch_size: B.
        sequence_length: a length that is wanted.
        on_host: an optimizer, and the training with that one: one more rung, with the last of the settings.
    """
    if sequence_length is not None:
        check_positions(setting.model, sequence_length)
    search = Search(budget, host_memory, batch_size)
    for mst, config in configs.items():
        search.add(setting, mst, config)
    if on_host is not None:
        optimizer, with_optimizer = on_host
        search.add(with_optimizer, mst, config, optimizer=optimizer)
    if not any(rung.max_length for rung in search.rungs):
        least = (setting.predict(config, SHORTEST, batch_size) for config in configs.values())
        raise _too_large(name, search, min(least, key=lambda prediction: prediction.total))
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
        host_memory=host_memory,
        rungs=tuple(search.rungs),
        wanted=wanted,
        notes=tuple(_notes(setting, search)),
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


def _too_large(name: str, search: Search, least: Prediction) -> TooLarge:
    parts = ", ".join(
        f"{in_words(n)} of {kind.replace('_', ' ')}" for kind, n in least.kinds.items() if n >= least.total / 100
    )
    host = "" if search.host_memory is None else f" and {in_words(search.host_memory)} of the host"
    on_host = f", and {in_words(least.host)} of the host" if least.host else ""
    return TooLarge(
        f"{name} does not fit {in_words(search.budget)}{host} at any length: {SHORTEST} tokens take "
        f"{in_words(least.total)} ({parts}){on_host}."
    )


def _notes(setting: Setting, search: Search) -> list[str]:
    notes = []
    if setting.device.is_gpu:
        notes.append(
            "Attention is modelled as the flash kernel of GPUs, linear in the length, also with windows and soft-caps."
        )
    notes.append(f"Overhead of the device: {setting.device.source}. Fragmentation is not modelled.")
    if any(rung.prediction is not None and rung.prediction.host for rung in search.rungs):
        limit = "not limited here" if search.host_memory is None else f"at most {in_words(search.host_memory)}"
        each = "" if setting.training.num_devices == 1 else " for each device"
        notes.append(f"Host: what a step keeps in the host's memory{each}, {limit}; other programs' comes on top.")
    return notes
