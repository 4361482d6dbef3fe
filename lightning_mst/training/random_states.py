"""The states of all random generators of a process, in a form that a checkpoint can hold."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

__all__ = ["random_states", "random_states_of_all_processes", "set_random_states"]


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, on the CPU and on ``device``.

    They consist of numbers, tuples and tensors, which ``torch.load(weights_only=True)`` reads.

    Args:
        device: Where the process computes.
    """
    numpy_state = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
        "cpu": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def random_states_of_all_processes(device: torch.device) -> list[dict[str, Any]]:
    """The :func:`random_states` of every process, by rank. All processes must call it at the same time.

    Args:
        device: Where this process computes.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, random_states(device))
    return gathered


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Put the generators of this process into saved states.

    A generator without a saved one, as a GPU's after a run on the CPU, keeps its own.

    Args:
        states: Of :func:`random_states`.
        device: Where the process computes.
    """
    random.setstate(states["python"])
    numpy_state = states["numpy"]
    key = numpy_state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})
    torch.set_rng_state(states["cpu"].cpu())
    if device.type in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type].cpu())
