"""``task=throughput``: how fast a training step is, at a batch size that is asked for or at the largest that fits."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from lightning_mst.experiments.fitting import Fitting, budget_of, limited_to
from lightning_mst.experiments.search import largest
from lightning_mst.experiments.step_time import seconds_per_step
from lightning_mst.experiments.subject import read_subject
from lightning_mst.program.errors import ConfigurationError
from lightning_mst.units import GIB

__all__ = ["run"]

LARGEST = "largest"


def run(config: DictConfig) -> dict[str, Any]:
    """Time the training step on a batch of ``task.batch`` sequences of ``data.sequence_length`` tokens.

    Args:
        config: As composed from ``conf/config.yaml`` with ``task=throughput``.

    Returns:
        The run's labels (see ``Subject``), ``sequence_length``, ``batch`` (what was asked for), ``batch_size`` (what
        ran, or None if nothing fits), ``fits``, ``seconds_per_step`` (the median; None where it is only predicted that
        the step fits), ``tokens_per_second``, ``peak_gib`` (tensors at the peak), ``memory_gib`` and ``how``.

    Raises:
        ConfigurationError: Something in it can't be done.
    """
    task = config.task
    _check_numbers(config)
    subject = read_subject(config)
    fitting = Fitting(subject, budget_of(task.memory, subject))
    length = subject.run.sequence_length
    if task.batch == LARGEST:
        batch_size = _largest_batch(fitting, length)
    else:
        batch_size = task.batch if fitting.fits(task.batch, length) else 0
    peak = fitting.peak(batch_size, length) if batch_size else None
    seconds = None
    if batch_size and subject.how == "measured":
        with limited_to(fitting.budget, subject.device):
            seconds = seconds_per_step(
                subject, batch_size, length, warmup_steps=task.warmup_steps, timed_steps=task.timed_steps
            )
    return {
        **subject.labels,
        "sequence_length": length,
        "batch": task.batch,
        "batch_size": batch_size or None,
        "fits": batch_size > 0,
        "seconds_per_step": seconds,
        "tokens_per_second": seconds and batch_size * length / seconds,
        "peak_gib": None if peak is None else peak / GIB,
        "memory_gib": fitting.budget / GIB,
        "how": subject.how,
    }


def _largest_batch(fitting: Fitting, length: int) -> int:
    subject = fitting.subject
    batch_size = largest(lambda size: subject.predict(size, length).total <= fitting.budget, start=1)
    if subject.how == "measured":
        batch_size = largest(lambda size: fitting.fits(size, length), start=batch_size)
    return batch_size


def _check_numbers(config: DictConfig) -> None:
    task = config.task
    for key, least in (("batch", 1), ("warmup_steps", 0), ("timed_steps", 1)):
        value = task[key]
        if key == "batch" and value == LARGEST:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            or_largest = f", or {LARGEST!r}" if key == "batch" else ""
            raise ConfigurationError(f"task.{key} should be a whole number, {least} or more{or_largest}; got {value!r}")
    if config.trainer.accumulate_grad_batches != 1:
        raise ConfigurationError(
            "trainer.accumulate_grad_batches: task=throughput times whole steps on one batch, got"
            f" {config.trainer.accumulate_grad_batches}. Set it to 1"
        )
