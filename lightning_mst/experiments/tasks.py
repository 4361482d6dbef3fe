"""One run of the program: training, or one measurement of an experiment."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lightning_mst.configurations import names_of
from lightning_mst.program.errors import ConfigurationError
from lightning_mst.program.results import remove_result, write_result
from lightning_mst.program.train import check_config, labels, train

__all__ = ["run_task"]


def run_task(config: DictConfig) -> dict[str, Any]:
    """Do what ``config.task`` says, and leave ``result.json`` in ``config.output_dir``.

    Args:
        config: As composed from ``conf/config.yaml``. ``task.name`` is ``"train"``, or the name of a module beside this
            one whose ``run(config)`` answers with a dictionary of results.

    Returns:
        What ``result.json`` holds: the task's results, ``status``, and what ``labels`` says of
        every run (see ``program/train.py``).

    Raises:
        ConfigurationError: A value is missing, unknown or does not go with another one.
    """
    name = config.task.name
    if name == "train":
        return train(config)
    if name not in names_of("task"):
        raise ConfigurationError(f"task.name: There is no task {name!r}; there are {', '.join(names_of('task'))}")
    folder = Path(config.output_dir)
    remove_result(folder)
    check_config(config)
    done = importlib.import_module(f"lightning_mst.experiments.{name}").run(config)
    result = {"status": "completed", **labels(config), **done}
    write_result(folder, result)
    return result
