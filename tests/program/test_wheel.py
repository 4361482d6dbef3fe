"""What users install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_carries_every_configuration(installed_wheel):
    conf = installed_wheel / "lightning_mst" / "conf"
    expected = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}

    assert Path("config.yaml") in expected
    assert expected <= {path.relative_to(conf) for path in conf.rglob("*.yaml")}


def test_an_installed_wheel_finds_its_own_configurations(installed_wheel, wheel_environment, tmp_path):
    options = {"cwd": tmp_path, "env": wheel_environment}
    code = "from lightning_mst.configurations import conf_dir; print(conf_dir())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **options)
    assert Path(shown.stdout.strip()) == installed_wheel.resolve() / "lightning_mst" / "conf"

    command = [sys.executable, "-m", "lightning_mst", "train", "--cfg", "job", "mst=off"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, **options)
    assert "checkpoint_layers: none" in shown.stdout
