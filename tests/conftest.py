"""Settings for all tests."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

# pytest-xdist runs one worker per core; torch's own threads would fight over them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import RANK_VARIABLES, environment, quiet_port

torch.set_num_threads(1)
_LINEAR = F.linear
_RANKS = {name: os.environ.get(name) for name in RANK_VARIABLES}
_ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _no_process_group_outlives_its_test() -> Iterator[None]:
    """Lightning keeps the group of a DDP run until the program ends; other trainers would take part in it."""
    os.environ["MASTER_PORT"] = str(quiet_port())
    yield
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    # As they were before all tests: a fixture of several tests may have started a run, too.
    for name, value in _RANKS.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def _linear_stays_torchs_own() -> Iterator[None]:
    """DeepSpeed's ZeRO-3 puts another function in its place for good, which computes more under checkpointing."""
    F.linear = _LINEAR
    yield
    F.linear = _LINEAR


@pytest.fixture(scope="session")
def installed_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what installing the wheel puts into ``site-packages``."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    built, folder = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(built), str(_ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture
def wheel_environment(installed_wheel: Path) -> dict[str, str]:
    """Variables of a program that imports the package from its wheel, whatever else is installed."""
    paths = [str(installed_wheel), os.environ.get("PYTHONPATH", "")]
    return environment(PYTHONPATH=os.pathsep.join(path for path in paths if path))
