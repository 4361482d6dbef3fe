"""Records one training step of a run and draws its memory beside that of the standard form."""

from __future__ import annotations

import json
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_mst.memory.places import Where
from lightning_mst.memory.tensor_bytes import TensorBytes
from lightning_mst.memory.timeline import Group, Timeline, groups_of, timeline_of
from lightning_mst.rewrite.handle import MSTHandle
from lightning_mst.training.predicted import CannotRehearse, RehearsedProgram
from lightning_mst.training.predicted_check import ends_step

__all__ = ["TimelineRecorder", "check_matplotlib"]

PICTURE, DATA, SNAPSHOT = "memory_timeline.png", "memory_timeline.json", "memory_snapshot.pickle"
_SNAPSHOT_ENTRIES = 200_000


class TimelineRecorder:
    """Takes the second step of a run, whose optimizer has its states, or the first if there is only one.

    Args:
        trainer: its ``default_root_dir`` is where the files go.
        handle: of the rewritten model.

    Attributes:
        recording: whether this step is recorded.
    """

    def __init__(self, trainer: Trainer, handle: MSTHandle) -> None:
        self._trainer = trainer
        self._handle = handle
        self._first_step = trainer.global_step
        self._groups: dict[Where, Group] = {}
        self._snapshot: ExitStack | None = None
        self._recorded: tuple[Timeline, Any, int] | None = None
        self._done = not trainer.is_global_zero
        self.recording = False

    def wants(self, batch_idx: int) -> bool:
        """Whether this batch's step is to be recorded."""
        if self._done or not ends_step(self._trainer, batch_idx):
            return False
        return self._recorded is None or self._trainer.global_step > self._first_step

    def begin(self) -> None:
        """The step that is wanted begins."""
        self.drop_step()
        self.recording = True
        self._snapshot = ExitStack()
        if self._trainer.strategy.root_device.type == "cuda":
            # Underscored, but documented: https://docs.pytorch.org/docs/stable/torch_cuda_memory.html
            torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_ENTRIES)
            self._snapshot.callback(torch.cuda.memory._record_memory_history, enabled=None)

    def end(self, held: TensorBytes, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """It is over."""
        if self._trainer.strategy.root_device.type == "cuda":
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self._folder / SNAPSHOT))
        self.drop_step()
        self._groups = groups_of(pl_module, self._handle.rows)
        assert self._handle.config is not None
        form = "standard" if self._handle.config.asks_for_nothing else "mini-sequences"
        timeline = timeline_of(held, self._groups, form=form, source="measured")
        steady = self._recorded is not None
        self._recorded = timeline, batch, batch_idx
        if steady:
            self.write(pl_module)

    def write(self, pl_module: LightningModule) -> None:
        """Draws what was recorded, if that is not done yet."""
        if self._done or self._recorded is None:
            return
        self._done = True
        measured, batch, batch_idx = self._recorded
        self._recorded = None
        timelines, note = [measured], "Blocks in the order of their work."
        if measured.form != "standard":
            try:
                held = RehearsedProgram(self._trainer, pl_module, batch, batch_idx).record_standard()
            except CannotRehearse as reason:
                note += f" The standard form can't be modelled: {reason}."
            else:
                timelines.insert(0, timeline_of(held, self._groups, form="standard", source="modelled"))
                note += " Modelled: the same step without mini-sequences, on fake tensors, with flash attention."
        if self._trainer.global_step <= self._first_step + 1:
            note += " Measured in the first step, in which optimizer states come up."
        title = f"Memory of one training step of {type(self._handle.model).__name__}{_size_of(batch)}"
        self._folder.mkdir(parents=True, exist_ok=True)
        data = {"title": title, "note": note, "timelines": [timeline.as_dict() for timeline in timelines]}
        (self._folder / DATA).write_text(json.dumps(data) + "\n", encoding="utf-8")
        from lightning_mst.memory.timeline_plot import plot_timelines

        plot_timelines(timelines, title, note, self._folder / PICTURE)
        rank_zero_info(f"The memory of one training step is drawn in {self._folder / PICTURE} (data: {DATA}).")

    def drop_step(self) -> None:
        """Stops recording, wherever the step is."""
        self.recording = False
        if self._snapshot is not None:
            self._snapshot.close()
        self._snapshot = None

    @property
    def _folder(self) -> Path:
        return Path(self._trainer.default_root_dir)


def check_matplotlib() -> None:
    """Makes sure that the figure can be drawn.

    Raises:
        MisconfigurationException: it can't.
    """
    if find_spec("matplotlib") is None:
        raise MisconfigurationException(
            "memory_timeline=True draws a figure with matplotlib, which is not installed: pip install"
            " 'lightning-mst[plots]', or set memory_timeline=False."
        )


def _size_of(batch: Any) -> str:
    """``", 2 x 4,096 tokens"``: the batch's largest first two dimensions."""
    sizes: list[tuple[int, ...]] = []
    apply_to_collection(batch, Tensor, lambda tensor: sizes.append(tuple(tensor.shape[:2])))
    sizes = [size for size in sizes if len(size) == 2]
    if not sizes:
        return ""
    rows, tokens = max(sizes, key=lambda size: size[0] * size[1])
    return f", {rows} x {tokens:,} tokens"
