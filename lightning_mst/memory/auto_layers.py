"""What has to be done to fit a device: as little as its memory allows, since all of it costs time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_mst.memory.optimizers import make_optimizer
from lightning_mst.memory.prediction import Prediction
from lightning_mst.memory.setting import PRECISIONS, Setting, Training
from lightning_mst.ops.free_host_memory import free_host_memory
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
    host_memory: str | int | None = None,
) -> MSTConfig:
    """Puts a list of layers in the place of ``checkpoint_layers="auto"``, for programs without Lightning.

    Where all layers are not enough, ``layer_chunks`` and then ``checkpoint_offload`` are set as well, unless the config
    has them. ``MSTCallback`` does this by itself, with the program's own training step.

    Args:
        config: as from ``MSTConfig.for_memory``, with ``device_memory`` and ``sequence_length``.
        model: the model, a causal language model of transformers or one that is called like it. It is not touched.
        optimizer: as for ``plan``.
        precision: Lightning's name of it; default: ``"...-true"`` with the dtype of the model's weights.
        device: the kind of device: ``"cuda"`` or ``"cpu"``.
        host_memory: what the host may keep, such as ``"512GiB"``. Default: what is free on this machine.

    Returns:
        A config for ``apply_mst``.

    Raises:
        ValueError: ``device_memory`` or ``sequence_length`` is missing, or the step does not fit whatever is done.
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
    settled = first_that_fits(
        config,
        lambda tried: setting.predict(tried, sequence_length, batch_size),
        num_layers=len(find_layers(setting.model)),
        room=Room(
            parse_bytes(config.device_memory), free_host_memory() if host_memory is None else parse_bytes(host_memory)
        ),
    )
    if settled.config is None:
        raise ValueError(settled.in_words())
    return settled.config


@dataclass(frozen=True)
class Room:
    """The memory that there is.

    Attributes:
        device: bytes of the device, of which ``RESERVE`` is kept.
        host: bytes of the host's memory.
    """

    device: int
    host: int

    @property
    def allowed(self) -> int:
        """Bytes that a step may take of the device."""
        return int(self.device * (1 - RESERVE))

    def holds(self, prediction: Prediction) -> bool:
        """Whether a step fits."""
        return prediction.total <= self.allowed and prediction.host <= self.host


@dataclass(frozen=True)
class Settled:
    """What ``checkpoint_layers="auto"`` came to.

    Attributes:
        config: what fits, or ``None``.
        tried: what was done to the layers, one thing after another, and the steps that this led to: all but the last
            with all layers checkpointed. The last is that of the config.
        room: the memory that there is.
    """

    config: MSTConfig | None
    tried: dict[str, Prediction]
    room: Room

    def in_words(self) -> str:
        """What was chosen and why, or why nothing fits."""
        *before, last = self.tried
        prediction = self.tried[last]
        if self.config is not None:
            why = ", ".join(f"{what} ({_taken(self.tried[what])})" for what in before)
            chosen = f"Not enough: {why}. Chosen: {last}. " if before else ""
            return f"{chosen}A step is predicted to take {_taken(prediction)} of {in_words(self.room.device)}."
        allowed = f"{in_words(self.room.allowed)} of {in_words(self.room.device)} are for it"
        host = f", and {in_words(self.room.host)} of the host" if prediction.host else ""
        return (
            f"Even with {last}, a step is predicted to take {_taken(prediction)} (peak in {prediction.phase}, "
            f"{prediction.block}); {allowed}{host}. Shorten the sequences, take an optimizer whose states are on the "
            "host (adamw_cpu_offload), or see `lightning-mst plan --ladder` for what fits."
        )


def first_that_fits(
    config: MSTConfig, predict: Callable[[MSTConfig], Prediction], *, num_layers: int, room: Room
) -> Settled:
    """The config that costs the least time of those that fit.

    As few layers as possible are checkpointed. Where all of them are not enough, the rest of each layer runs in
    mini-sequences as well, and where that is not enough, the layers' inputs go to the host. Attention's outputs would
    free nothing on the device there.

    Args:
        config: whose ``checkpoint_layers`` is to be replaced. What it says of ``layer_chunks`` and
            ``checkpoint_offload`` stays, but for ``None``.
        predict: the peak of a step under a config.
        num_layers: the model's.
        room: the memory that there is.
    """
    tried: dict[str, Prediction] = {}
    for what, rung in _rungs(config):
        found, tried[what] = fewest_layers(rung, predict, num_layers=num_layers, room=room)
        if found is not None:
            return Settled(found, tried, room)
    return Settled(None, tried, room)


def _rungs(config: MSTConfig) -> Iterator[tuple[str, MSTConfig]]:
    """What to do to layers, each with less memory on the device than the one before."""
    yield "all layers checkpointed", config
    if config.layer_chunks is None:
        config = replace(config, layer_chunks="auto")
        yield "layers wholly in mini-sequences (layer_chunks='auto')", config
    if config.checkpoint_offload is None:
        yield "layers' inputs on the host (checkpoint_offload='inputs')", replace(config, checkpoint_offload="inputs")


def _taken(prediction: Prediction) -> str:
    host = f" and {in_words(prediction.host)} of the host" if prediction.host else ""
    return f"{in_words(prediction.total)}{host}"


def fewest_layers(
    config: MSTConfig, predict: Callable[[MSTConfig], Prediction], *, num_layers: int, room: Room
) -> tuple[MSTConfig | None, Prediction]:
    """The config with as few checkpointed layers as fit.

    They are the first ones: backward comes to them last, when what the others kept is gone.

    Args:
        config: whose ``checkpoint_layers`` is to be replaced.
        predict: the peak of a step under a config.
        num_layers: the model's.
        room: the memory that there is.

    Returns:
        The config, ``None`` if the step does not fit even with all layers checkpointed; and the prediction for it.
    """
    predictions: dict[int, Prediction] = {}

    def at(count: int) -> Prediction:
        if count not in predictions:
            predictions[count] = predict(_with_first(config, count, num_layers))
        return predictions[count]

    if at(num_layers).total > room.allowed:
        return None, at(num_layers)
    if room.holds(at(0)):
        return _with_first(config, 0, num_layers), at(0)
    if not room.holds(at(num_layers)):  # their inputs are too much for the host
        return None, at(num_layers)
    too_few, enough = 0, num_layers
    while enough - too_few > 1:
        # Memory falls with the number in a straight line, but for where the peak moves to another place.
        share = (at(too_few).total - room.allowed) / (at(too_few).total - at(enough).total)
        guess = min(enough - 1, max(too_few + 1, too_few + round(share * (enough - too_few))))
        if room.holds(at(guess)):
            enough = guess
        else:
            too_few = guess
    return _with_first(config, enough, num_layers), at(enough)


def _with_first(config: MSTConfig, count: int, num_layers: int) -> MSTConfig:
    """A config that says all there is to say."""
    layers: Any = ("all" if count else "none") if count in (0, num_layers) else list(range(count))
    sizes: dict[str, Any] = {"device_memory": None, "sequence_length": None, "batch_size": 1}
    if count == 0:  # nothing is kept for a recomputation that could go to the host
        sizes |= {"checkpoint_offload": None, "offload_fraction": 0.0}
    return replace(config, checkpoint_layers=layers, **sizes)


def _precision_of(model: nn.Module) -> str:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    for name, (dtype, autocast) in PRECISIONS.items():
        if dtypes == {dtype} and autocast is None:
            return name
    found = ", ".join(sorted(str(dtype) for dtype in dtypes))
    raise ValueError(f"The model's weights are {found}. Say which precision it trains in: {', '.join(PRECISIONS)}.")
