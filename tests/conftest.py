"""Settings for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

# pytest-xdist runs one worker per core; torch's own threads would fight over them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import RANK_VARIABLES, quiet_port

torch.set_num_threads(1)
_LINEAR = F.linear


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _no_process_group_outlives_its_test() -> Iterator[None]:
    """Lightning keeps the group of a DDP run until the program ends; other trainers would take part in it."""
    before = dict(os.environ)
    os.environ["MASTER_PORT"] = str(quiet_port())
    yield
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    for name in RANK_VARIABLES:
        if name in before:
            os.environ[name] = before[name]
        else:
            os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _linear_stays_torchs_own() -> Iterator[None]:
    """DeepSpeed's ZeRO-3 puts another function in its place for good, which computes more under checkpointing."""
    F.linear = _LINEAR
    yield
    F.linear = _LINEAR
