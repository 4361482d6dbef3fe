"""``task=block``: time and memory of one LM head with its loss, or of one MLP, standard and in mini-sequences."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from lightning_mst.experiments.block_cost import median_seconds, peak_bytes, predicted_bytes
from lightning_mst.experiments.one_block import KINDS, Block
from lightning_mst.experiments.subject import Subject, read_subject
from lightning_mst.memory.setting import PRECISIONS
from lightning_mst.program.errors import ConfigurationError, configuration_of
from lightning_mst.program.plan_measure import real_model
from lightning_mst.units import GIB

__all__ = ["run"]


def run(config: DictConfig) -> dict[str, Any]:
    """Run ``task.block`` of the model on ``data.sequence_length`` random tokens, forward and backward.

    Args:
        config: As composed from ``conf/config.yaml`` with ``task=block``.

    Returns:
        ``block``, ``model``, ``sequence_length``, ``batch_size``, ``hidden_size``, ``intermediate_size``,
        ``vocab_size``, ``precision``, ``how``, ``repetitions`` (of each time) and ``rows``: one for each form, with
        ``num_chunks`` (None is the standard form), ``seconds`` (the median; None where memory is only predicted) and
        ``peak_gib`` (the block's weights and input included). Both are None where memory runs out.

    Raises:
        ConfigurationError: Something in it can't be done.
    """
    task = config.task
    check_task(config)
    subject = read_subject(config)
    contestants = [None, *task.num_chunks]
    sizes = subject.setting.model.config.get_text_config()
    shape = subject.run.batch_size, subject.run.sequence_length
    if subject.how == "measured":
        peaks, seconds = _measure(subject, task.block, shape, contestants, task.repetitions)
    else:
        peaks, seconds = _predict(subject, task.block, shape, contestants), {}
    return {
        "block": task.block,
        "model": subject.run.model,
        "sequence_length": subject.run.sequence_length,
        "batch_size": subject.run.batch_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": getattr(sizes, "intermediate_size", None),
        "vocab_size": sizes.vocab_size,
        "precision": subject.labels["precision"],
        "how": subject.how,
        "repetitions": task.repetitions,
        "rows": [
            {"num_chunks": num_chunks, "seconds": seconds.get(num_chunks), "peak_gib": _gib(peaks[num_chunks])}
            for num_chunks in contestants
        ],
    }


def _predict(
    subject: Subject, kind: Any, shape: tuple[int, int], contestants: list[int | None]
) -> dict[int | None, int | None]:
    fake, model = subject.setting.fake, subject.setting.model
    block = _block(subject, model, kind)
    with fake:
        hidden = _hidden(model, shape, torch.device("cpu"))
    labels = torch.zeros(shape, dtype=torch.int64)
    peaks: dict[int | None, int | None] = {}
    for num_chunks in contestants:
        block.set_chunks(num_chunks)
        peaks[num_chunks] = predicted_bytes(block, hidden, labels, fake)
    return peaks


def _measure(
    subject: Subject, kind: Any, shape: tuple[int, int], contestants: list[int | None], repetitions: int
) -> tuple[dict[int | None, int | None], dict[int | None, float]]:
    model = real_model(subject.run.build_model, subject.run.training, subject.device)
    block = _block(subject, model, kind)
    hidden = _hidden(model, shape, subject.device)
    vocab_size = model.config.get_text_config().vocab_size
    labels = torch.randint(vocab_size, shape, device=subject.device)
    # A few tokens set up the libraries, whose workspaces are no part of a block.
    block.step(hidden[:, :2].detach().requires_grad_(), labels[:, :2])
    peaks: dict[int | None, int | None] = {}
    for num_chunks in contestants:
        block.set_chunks(num_chunks)
        peaks[num_chunks] = peak_bytes(block, hidden, labels)
    fitting = [num_chunks for num_chunks, peak in peaks.items() if peak is not None]
    return peaks, median_seconds(block, hidden, labels, fitting, repetitions)


def _block(subject: Subject, model: nn.Module, kind: Any) -> Block:
    with configuration_of(f"task.block={kind}"):
        return Block(model, kind, autocast=PRECISIONS[subject.run.training.precision][1])


def _hidden(model: nn.Module, shape: tuple[int, int], device: torch.device) -> Tensor:
    size = model.config.get_text_config().hidden_size
    return torch.randn(*shape, size, dtype=next(model.parameters()).dtype, device=device, requires_grad=True)


def _gib(size: int | None) -> float | None:
    return None if size is None else size / GIB


def check_task(config: DictConfig) -> None:
    """Find wrong parameters before a model is built.

    Raises:
        ConfigurationError: There is one.
    """
    task = config.task
    if task.block not in KINDS:
        raise ConfigurationError(f"task.block should be {' or '.join(KINDS)}, got {task.block!r}")
    numbers = OmegaConf.to_container(task.num_chunks) if OmegaConf.is_list(task.num_chunks) else task.num_chunks
    if not isinstance(numbers, list) or not numbers or not all(map(_is_positive, numbers)):
        raise ConfigurationError(f"task.num_chunks should be a list of whole numbers such as [2,4,8], got {numbers!r}")
    if len(set(numbers)) < len(numbers):
        raise ConfigurationError(f"task.num_chunks should hold each number once, got {numbers}")
    if not _is_positive(task.repetitions):
        raise ConfigurationError(f"task.repetitions should be a whole number, 1 or more, got {task.repetitions!r}")
    if config.quantization or config.adapter:
        raise ConfigurationError(
            "task=block measures a block with plain trained weights, got quantized ones or an adapter. Choose a"
            " precision without them, such as precision=bf16-true"
        )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
