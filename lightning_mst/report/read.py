"""Finds runs and reads what they left."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lightning_mst.program.results import read_result
from lightning_mst.program.sweep import read_overrides

__all__ = ["Run", "find_runs"]

# Of a run that failed, its result.json does not say what it was; Hydra's files do. Name in result.json -> Hydra's.
_CHOICES = {
    "task": "task", "experiment": "experiment", "model": "model", "mst_name": "mst", "optimizer": "optimizer",
    "precision": "precision", "quantization": "quantization", "adapter": "adapter",
}  # fmt: skip
_VALUES = {
    "sequence_length": "data.sequence_length",
    "batch_size": "data.batch_size",
    "accumulate_grad_batches": "trainer.accumulate_grad_batches",
    "seed": "seed",
    "layers": "model.config.num_hidden_layers",
    "shrink": "model.shrink",
    "block": "task.block",
    "batch": "task.batch",
}


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        folder: Where it left its files.
        name: The folder, as seen from the one that was asked for.
        result: What ``result.json`` says, and what it was meant to be where that says nothing.
        overrides: What its command line and its sweep had set, key -> value.
        sweep: The sweep's folder, or None for a run by itself.
        order: Its number in the sweep.
    """

    folder: Path
    name: str
    result: dict[str, Any]
    overrides: dict[str, str] = field(default_factory=dict)
    sweep: Path | None = None
    order: int = 0

    def get(self, key: str) -> Any:
        """A value of the result, or None."""
        return self.result.get(key)

    @property
    def completed(self) -> bool:
        """Whether it got to its end."""
        return self.get("status") == "completed"

    @property
    def number(self) -> str:
        """Its folder within that of the sweep, or all of its name for a run by itself."""
        return self.folder.resolve().relative_to(self.sweep).as_posix() if self.sweep else self.name

    @property
    def place(self) -> str:
        """The folder of its sweep, or the folder it lies in, as seen from the one that was asked for."""
        number = self.number if self.sweep else self.folder.name
        return self.name.removesuffix(number).rstrip("/") or (self.sweep or self.folder.resolve().parent).name

    @property
    def experiment(self) -> str | None:
        """Which file of ``conf/experiment`` it belongs to, such as ``"paper/lm_head"``."""
        return self.get("experiment")

    @property
    def topic(self) -> str:
        """The experiment without its size, such as ``"lm_head"``."""
        return (self.experiment or "").rpartition("/")[2]

    @property
    def at_paper_size(self) -> bool:
        """Whether the paper's figures may be set beside it."""
        return (self.experiment or "").startswith("paper/")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration as Hydra composed it, interpolations as they were written; empty if it was not kept."""
        return _load(self.folder / ".hydra" / "config.yaml")


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """All runs in and below some folders, in the order of their names and of their numbers in a sweep.

    A run is a folder with a ``result.json``, or with Hydra's files and none: the latter has died without a word, or
    has not come to its end yet, and counts as failed.

    Args:
        folders: Where to look; what lies below two of them is read once.

    Returns:
        None twice, and none left out.
    """
    folders = list(folders)
    runs: dict[Path, Run] = {}
    for top in folders:
        found = {path.parent for path in top.rglob("result.json")}
        found |= {path.parent.parent for path in top.rglob(".hydra/overrides.yaml")}
        for folder in found:
            name = folder.relative_to(top) if len(folders) == 1 and folder != top else folder
            runs.setdefault(folder.resolve(), read_run(folder, name.as_posix()))
    return sorted(runs.values(), key=lambda run: (str(run.sweep or run.folder.parent), run.order, run.name))


def read_run(folder: Path, name: str) -> Run:
    """What lies in the folder of a run."""
    hydra = _load(folder / ".hydra" / "hydra.yaml").get("hydra", {})
    config = OmegaConf.create(_load(folder / ".hydra" / "config.yaml"))
    choices = hydra.get("runtime", {}).get("choices", {})
    meant = {key: choices.get(group) for key, group in _CHOICES.items() if choices.get(group) != "none"}
    # A run may have failed just because a value led nowhere.
    meant |= {key: OmegaConf.select(config, path, throw_on_resolution_failure=False) for key, path in _VALUES.items()}
    overrides = folder / ".hydra" / "overrides.yaml"
    # Hydra leaves this file in the folder of a sweep, wherever that has been moved to since.
    sweep = next((parent for parent in folder.resolve().parents if (parent / "multirun.yaml").is_file()), None)
    number = hydra.get("job", {}).get("num")
    result = {key: value for key, value in meant.items() if value is not None} | _result(folder)
    if result.get("shrink") == 1:  # the real size goes without saying
        del result["shrink"]
    return Run(
        folder=folder,
        name=name,
        result=result,
        overrides=read_overrides(overrides) if overrides.is_file() else {},
        sweep=sweep,
        order=number if isinstance(number, int) else 0,
    )


def _result(folder: Path) -> dict[str, Any]:
    try:
        result = read_result(folder)
    except json.JSONDecodeError as error:
        return {"status": "failed", "error": f"result.json can't be read: {error}"}
    return result or {"status": "failed", "error": "no result.json: the run died without a word, or is still running"}


def _load(path: Path) -> dict[str, Any]:
    content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False) if path.is_file() else {}
    return content
