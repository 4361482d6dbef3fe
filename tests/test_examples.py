"""Every example runs from an empty folder and prints what it promises."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, folder: Path) -> str:
    shutil.copy(EXAMPLES / name, folder)
    options = {"cwd": folder, "capture_output": True, "text": True, "timeout": 300, "env": environment()}
    done = subprocess.run([sys.executable, name], check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_lightning_example_trains_and_logs_its_peak_memory(tmp_path):
    output = run("lightning_trainer.py", tmp_path)
    assert "model.lm_head" in output
    assert float(re.search(r"train_loss: ([\d.]+)", output)[1]) < 8
    assert float(re.search(r"peak_memory_gib: ([\d.]+)", output)[1]) > 0.05


def test_the_plain_example_shows_the_same_loss_in_less_memory(tmp_path):
    output = run("plain_pytorch.py", tmp_path)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", output)]
    peaks = [float(x) for x in re.findall(r"peak (\d+) MiB", output)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    assert peaks[1] < 0.5 * peaks[0]
    assert peaks[1] < peaks[2] < peaks[0]
    assert peaks[3] == peaks[0]


def test_the_qlora_example_trains_adapters_on_4_bit_weights(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    output = run("qlora.py", tmp_path)
    before, after = (float(x) for x in re.findall(r"([\d.]+) MiB", output))
    assert after < 0.5 * before
    assert "LlamaMLP            M = 4" in output
    assert float(re.search(r"train_loss: ([\d.]+)", output)[1]) < 6.5  # random guesses: 6.9


def test_the_sharded_example_trains_on_two_processes(tmp_path):
    output = run("sharded_trainer.py", tmp_path)
    assert "FSDPLlamaDecoderLayer" in output
    assert float(re.search(r"train_loss: ([\d.]+)", output)[1]) < 8
    assert float(re.search(r"peak_memory_gib: ([\d.]+)", output)[1]) > 0.05


def test_every_example_is_tested_and_listed():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == set(re.findall(r"run\(\"(\w+\.py)\"", Path(__file__).read_text()))
    assert all(f"`{name}`" in (EXAMPLES / "README.md").read_text() for name in names)
