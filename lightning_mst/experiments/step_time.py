"""How long a run's training step takes."""

from __future__ import annotations

import statistics
import time

import torch

from lightning_mst.experiments.fitting import release
from lightning_mst.experiments.subject import Subject
from lightning_mst.memory.prediction import vocab_size_of
from lightning_mst.program.plan_measure import real_model, take_step
from lightning_mst.rewrite.handle import apply_mst

__all__ = ["now", "seconds_per_step"]


def seconds_per_step(
    subject: Subject, batch_size: int, sequence_length: int, *, warmup_steps: int, timed_steps: int
) -> float:
    """The median time of real steps with random weights and tokens.

    Args:
        subject: The run.
        batch_size: B.
        sequence_length: S.
        warmup_steps: Steps before the first that counts: they make the optimizer's states, and libraries set up.
        timed_steps: Steps that count.

    Returns:
        Seconds.
    """
    training, device = subject.run.training, subject.device
    step = subject.setting.step(sequence_length, batch_size)
    model = real_model(subject.run.build_model, training, device)
    if not subject.mst.asks_for_nothing:
        apply_mst(model, subject.mst)
    optimizer = training.make_optimizer(model)
    tokens = torch.randint(vocab_size_of(model) or 2, (batch_size, sequence_length), device=device)
    batch = {"input_ids": tokens, "labels": tokens}
    seconds = []
    for _ in range(warmup_steps + timed_steps):
        start = now(device)
        take_step(model, optimizer, batch, step, accumulates=False)
        seconds.append(now(device) - start)
    del model, optimizer, batch, tokens
    release(device)
    return statistics.median(seconds[warmup_steps:])


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
