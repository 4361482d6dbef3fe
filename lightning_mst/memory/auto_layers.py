"""How many layers have to be checkpointed: as few as memory allows, since each costs a second forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_mst.memory.optimizers import make_optimizer
from lightning_mst.memory.prediction import Prediction
from lightning_mst.memory.setting import PRECISIONS, Setting, Training
from lightning_mst.rewrite.config import MSTConfig
from lightning_mst.rewrite.discovery import find_layers
from lightning_mst.units import in_words, parse_bytes

RESERVE = 0.03
"""The share of a device's memory that is left to what is not modelled, fragmentation above all."""


def settle(
    config: MSTConfig,
    model: nn.Module,
    *,
    optimizer: str | Callable[[nn.Module], Optimizer | None] = "adamw",
    precision: str | None = None,
    device: str = "cuda",
) -> MSTConfig:
    """Puts a list of layers in the place of ``checkpoint_layers="auto"``, for programs without Lightning.

    ``MSTCallback`` does this by itself, with the program's own training step.

    Args:
        config: as from ``MSTConfig.for_memory``, with ``device_memory`` and ``sequence_length``.
        model: the model, a causal language model of transformers or one that is called like it. It is not touched.
        optimizer: as for ``plan``.
        precision: Lightning's name of it; default: ``"...-true"`` with the dtype of the model's weights.
        device: the kind of device: ``"cuda"`` or ``"cpu"``.

    Returns:
        A config for ``apply_mst``.

    Raises:
        ValueError: ``device_memory`` or ``sequence_length`` is missing, or the step does not fit even with all layers
            checkpointed.
    """
    if config.checkpoint_layers != "auto":
        return config
    if config.device_memory is None or config.sequence_length is None:
        raise ValueError(
            "checkpoint_layers='auto' needs to know the device's memory and the length of the sequences: "
            "MSTConfig.for_memory('80GiB', sequence_length=65536)."
        )
    make = make_optimizer(optimizer) if isinstance(optimizer, str) else optimizer
    setting = Setting(model, Training(precision or _precision_of(model), make, device=device))
    sequence_length, batch_size = config.sequence_length, config.batch_size
    settled, prediction = fewest_layers(
        config,
        lambda tried: setting.predict(tried, sequence_length, batch_size),
        num_layers=len(find_layers(setting.model)),
        budget=parse_bytes(config.device_memory),
    )
    if settled is None:
        raise ValueError(does_not_fit(prediction, parse_bytes(config.device_memory)))
    return settled


def fewest_layers(
    config: MSTConfig, predict: Callable[[MSTConfig], Prediction], *, num_layers: int, budget: int
) -> tuple[MSTConfig | None, Prediction]:
    """The config with as few checkpointed layers as fit.

    They are the first ones: backward comes to them last, when what the others kept is gone.

    Args:
        config: whose ``checkpoint_layers`` is to be replaced.
        predict: the peak of a step under a config.
        num_layers: the model's.
        budget: bytes of the device, of which ``RESERVE`` is kept.

    Returns:
        The config, ``None`` if the step does not fit even with all layers checkpointed; and the prediction for it.
    """
    allowed = int(budget * (1 - RESERVE))
    predictions: dict[int, Prediction] = {}

    def at(count: int) -> int:
        if count not in predictions:
            predictions[count] = predict(_with_first(config, count, num_layers))
        return predictions[count].total

    if at(num_layers) > allowed:
        return None, predictions[num_layers]
    if at(0) <= allowed:
        return _with_first(config, 0, num_layers), predictions[0]
    too_few, enough = 0, num_layers
    while enough - too_few > 1:
        # Memory falls with the number in a straight line, but for where the peak moves to another place.
        share = (at(too_few) - allowed) / (at(too_few) - at(enough))
        guess = min(enough - 1, max(too_few + 1, too_few + round(share * (enough - too_few))))
        if at(guess) <= allowed:
            enough = guess
        else:
            too_few = guess
    return _with_first(config, enough, num_layers), predictions[enough]


def does_not_fit(prediction: Prediction, budget: int) -> str:
    """The message for a step that does not fit with all layers checkpointed."""
    return (
        f"Even with all layers checkpointed, a step is predicted to take {in_words(prediction.total)} (peak in "
        f"{prediction.phase}, {prediction.block}); {in_words(int(budget * (1 - RESERVE)))} of {in_words(budget)} are "
        "for it. Shorten the sequences, or see `lightning-mst plan` for what fits."
    )


def _with_first(config: MSTConfig, count: int, num_layers: int) -> MSTConfig:
    """A config that says all there is to say."""
    layers: Any = ("all" if count else "none") if count in (0, num_layers) else list(range(count))
    return replace(config, checkpoint_layers=layers, device_memory=None, sequence_length=None, batch_size=1)


def _precision_of(model: nn.Module) -> str:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    for name, (dtype, autocast) in PRECISIONS.items():
        if dtypes == {dtype} and autocast is None:
            return name
    found = ", ".join(sorted(str(dtype) for dtype in dtypes))
    raise ValueError(f"The model's weights are {found}. Say which precision it trains in: {', '.join(PRECISIONS)}.")
