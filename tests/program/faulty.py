"""A callback for the tests of failing processes, which find it by PYTHONPATH."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class Faulty(pl.Callback):
    """Notes the process of each rank in a folder; one of them fails in its second step."""

    def __init__(self, folder: str, rank: int) -> None:
        self.folder = Path(folder)
        self.rank = rank

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        (self.folder / f"rank_{trainer.global_rank}.pid").write_text(str(os.getpid()))
        if batch_idx == 1 and trainer.global_rank == self.rank:
            raise RuntimeError(f"the disk of rank {self.rank} is on fire")
