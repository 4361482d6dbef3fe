"""How far each of several settings gets: a ladder of ever longer sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec

from torch import nn

from lightning_mst.memory.longest import LONGEST, longest
from lightning_mst.memory.optimizers import make_optimizer
from lightning_mst.memory.passes import Passes, passes_of
from lightning_mst.memory.prediction import Prediction
from lightning_mst.memory.setting import Setting, Training
from lightning_mst.models import num_positions
from lightning_mst.rewrite.config import MSTConfig

RUNGS = ("off", "recompute", "paper", "auto")
"""The settings of ``conf/mst`` that a plan compares unless it is told others."""

LADDER = ("off", "recompute", "paper", "layer", "layer_offload", "layer_offload_attention")
"""Settings of ``conf/mst``, each for longer sequences or less computation than the one before."""

_COUNTED = 2 * 13
"""Tokens of the step whose matmuls are counted; halves of it have no size that a weight would have."""


@dataclass(frozen=True)
class Rung:
    """How far one setting gets.

    Attributes:
        mst: its name in ``conf/mst``.
        config: the setting.
        max_length: the longest sequence that fits, in tokens; 0 if none does.
        prediction: the peak at that length, or ``None``.
        passes: the matmuls of a step.
        curve: the (length, bytes on the device) that were tried, in order.
        optimizer: the optimizer that takes the place of the run's own, if one does.
    """

    mst: str
    config: MSTConfig
    max_length: int
    prediction: Prediction | None
    passes: Passes
    curve: tuple[tuple[int, int], ...]
    optimizer: str | None = None


class Search:
    """Finds how far settings get, one after another.

    Args:
        budget: bytes of each device.
        host_memory: bytes of the host's memory for each device, or ``None`` where nothing limits them.
        batch_size: B, sequences on each device.

    Attributes:
        rungs: those found so far.
    """

    def __init__(self, budget: int, host_memory: int | None, batch_size: int) -> None:
        self.budget = budget
        self.host_memory = host_memory
        self.rungs: list[Rung] = []
        self._batch_size = batch_size

    def add(self, setting: Setting, name: str, config: MSTConfig, *, optimizer: str | None = None) -> None:
        """Finds one more.

        Args:
            setting: the model and its training.
            name: of the config.
            config: the form of the model.
            optimizer: what the rung calls the setting's optimizer, if it is not the run's own.
        """
        predictions: dict[int, Prediction] = {}

        def needed(length: int) -> int:
            predictions[length] = prediction = setting.predict(config, length, self._batch_size)
            return max(prediction.total, self._as_on_device(prediction.host))

        limit = min(LONGEST, num_positions(setting.model) or LONGEST)
        expected = max((before.max_length for before in self.rungs), default=0)
        found = longest(needed, self.budget, limit=limit, expected=expected)
        if len(predictions) == 2:  # the curve is not straight between them: mini-sequences begin at some length
            needed(math.isqrt(min(predictions) * max(predictions)))
        curve = tuple((length, predictions[length].total) for length in sorted(predictions))
        passes = _passes(setting, config)
        self.rungs.append(Rung(name, config, found, predictions.get(found), passes, curve, optimizer))

    def _as_on_device(self, host: int) -> int:
        """Bytes of the host, so scaled that they fill the device when they fill the host."""
        return 0 if self.host_memory is None else math.ceil(host * self.budget / self.host_memory)


def with_optimizer_on_host(
    model: nn.Module | Callable[[], nn.Module], training: Training
) -> tuple[str, Setting] | None:
    """The training with its optimizer on the host, for the last rung of a ladder.

    Args:
        model: as for ``Setting``.
        training: with any optimizer.

    Returns:
        The name of the optimizer, and the setting; ``None`` where no engine brings one: torchao's is for one device
        and one batch per step, DeepSpeed's for its stage 3.

    Raises:
        ModuleNotFoundError: the engine is not installed.
    """
    if training.strategy == "single" and training.accumulate_grad_batches == 1:
        name, strategy, package, extra = "adamw_cpu_offload", "single", "torchao", "quantized"
    elif training.strategy == "zero3":
        name, strategy, package, extra = "deepspeed_cpu_adam", "zero3_offload", "deepspeed", "deepspeed"
    else:
        return None
    if find_spec(package) is None:  # told now, not after all the other rungs
        raise ModuleNotFoundError(
            f"A ladder ends with the optimizer on the host ({name}), which needs the package {package}: "
            f"pip install 'lightning-mst[{extra}]'",
            name=package,
        )
    return name, Setting(model, replace(training, make_optimizer=make_optimizer(name), strategy=strategy))


def _passes(setting: Setting, config: MSTConfig) -> Passes:
    """Two short mini-sequences cost what many long ones do in passes, and are counted in a second."""
    setting.rewrite(
        replace(
            config,
            mlp_chunks=config.mlp_chunks and 2,
            lm_head_chunks=config.lm_head_chunks and 2,
            layer_chunks=config.layer_chunks and 2,
        )
    )
    return passes_of(setting.model, setting.step(_COUNTED), setting.fake)
