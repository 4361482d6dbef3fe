"""What users install."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_carries_every_configuration(wheel):
    expected = {f"lightning_mst/conf/{path.relative_to(ROOT / 'conf')}" for path in (ROOT / "conf").rglob("*.yaml")}

    assert "lightning_mst/conf/config.yaml" in expected
    assert expected <= set(zipfile.ZipFile(wheel).namelist())


def test_an_installed_wheel_finds_its_own_configurations(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)  # which is what installing it does
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    code = "from lightning_mst.configurations import conf_dir; print(conf_dir())"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(shown.stdout.strip()) == tmp_path.resolve() / "lightning_mst" / "conf"

    command = [sys.executable, "-m", "lightning_mst", "train", "--cfg", "job", "mst=off"]
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "checkpoint_layers: none" in shown.stdout
