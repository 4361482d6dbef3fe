"""Lightning's messages under Hydra's logging."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_lightning", "tidy_lightning_output"]

_RANK_ZERO = "lightning.pytorch.utilities.rank_zero"


def tidy_lightning_output() -> None:
    """Let each message of Lightning appear once, in the run's log too, and without what no user can act on.

    Imported before logging is set up, Lightning's loggers print by themselves and pass nothing on; imported later they
    do both, so that below Hydra's handlers every message comes twice.
    """
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    rank_zero = logging.getLogger(_RANK_ZERO)
    if _is_no_tip not in rank_zero.filters:
        rank_zero.addFilter(_is_no_tip)
    # Reading a mapped file is fastest in the process that trains.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # Lightning's and PEFT's own use of torch and transformers.
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", ".*`is_gradient_checkpointing` is deprecated.*")
    # The perplexity is a metric that sums over all processes by itself.
    warnings.filterwarnings("ignore", r".*log\('val_(perplexity|loss)', ..., sync_dist=True\).*")
    # Where they are installed: which of their kernels for other hardware this machine has no use for.
    for name in ("torchao", "bitsandbytes.backends.cpu.ops", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep back what a Trainer says about the machine, where it is only asked and does not train."""
    rank_zero = logging.getLogger(_RANK_ZERO)
    before = rank_zero.level
    rank_zero.setLevel(logging.WARNING)
    try:
        yield
    finally:
        rank_zero.setLevel(before)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()
