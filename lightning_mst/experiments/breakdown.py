"""``task=breakdown``: what fills the memory at the peak of a training step."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from lightning_mst.experiments.fitting import measured_peak
from lightning_mst.experiments.subject import read_subject
from lightning_mst.memory.planner import peak_place
from lightning_mst.units import GIB

__all__ = ["run"]


def run(config: DictConfig) -> dict[str, Any]:
    """Predict the bytes of each kind of tensor at the peak, and measure that peak where real steps can run.

    Args:
        config: As composed from ``conf/config.yaml`` with ``task=breakdown``.

    Returns:
        The run's labels (see ``Subject``), ``sequence_length``, ``batch_size``, ``kinds_gib`` (what the tensors at the
        predicted peak are), ``peak_gib`` (their sum), ``where`` (phase, layer and block), ``measured_peak_gib`` (the
        same sum in a real step, or None), and ``how``: ``"measured"`` if that is there.

    Raises:
        ConfigurationError: Something in it can't be done.
    """
    subject = read_subject(config)
    batch_size, length = subject.run.batch_size, subject.run.sequence_length
    predicted = subject.predict(batch_size, length)
    measured = measured_peak(subject, batch_size, length) if subject.how == "measured" else None
    return {
        **subject.labels,
        "sequence_length": length,
        "batch_size": batch_size,
        # The device's own overhead is no tensor's.
        "kinds_gib": {kind: size / GIB for kind, size in predicted.kinds.items() if kind != "overhead"},
        "peak_gib": predicted.tensors / GIB,
        "where": peak_place(predicted),
        "measured_peak_gib": None if measured is None else measured / GIB,
        "how": "predicted" if measured is None else "measured",
    }
