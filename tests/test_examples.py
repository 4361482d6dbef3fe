"""Every example, copied alone into an empty folder, runs with the package from its wheel and keeps its promise."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).parent.parent / "examples"
MATERIALIZED = "needs the real logits"  # from DeferredLogitsWarning: all logits of a sequence were formed


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables that keep the examples' caches out of the user's, shared so that a tokenizer is trained once."""
    folder = tmp_path_factory.mktemp("caches")
    return {"XDG_CACHE_HOME": str(folder), "HF_HOME": str(folder / "huggingface"), "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def run(tmp_path: Path, wheel_environment: dict[str, str], caches: dict[str, str]) -> Callable[[str], str]:
    """``run(name)`` runs an example in ``tmp_path`` and gives back what it wrote to its output and to its errors."""
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    programs = {".py": sys.executable, ".sh": "sh"}

    def run(name: str) -> str:
        shutil.copy(EXAMPLES / name, tmp_path)
        done = subprocess.run(
            [programs[Path(name).suffix], name],
            cwd=tmp_path,
            env={**wheel_environment, **caches, "PATH": scripts, "COLUMNS": "160"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


def value(name: str, output: str) -> float:
    """The number that stands behind ``name: ``."""
    return float(re.search(rf"{name}: ([\d.]+)", output)[1])


def held_out_losses(output: str) -> list[float]:
    """Before training, after it, and whatever the example prints then."""
    return [float(x) for line in re.findall(r"held-out loss: (.*)", output) for x in re.findall(r"\d+\.\d+", line)]


def test_the_package_comes_from_the_wheel(wheel_environment, installed_wheel, tmp_path):
    code = "import lightning_mst; print(lightning_mst.__file__)"
    options = {"cwd": tmp_path, "env": wheel_environment, "capture_output": True, "text": True, "check": True}
    shown = subprocess.run([sys.executable, "-c", code], **options)
    assert Path(shown.stdout.strip()) == installed_wheel / "lightning_mst" / "__init__.py"


def test_the_lightning_example_trains_and_logs_its_peak_memory(run):
    output = run("lightning_trainer.py")
    assert "model.lm_head" in output
    assert value("train_loss", output) < 8
    assert value("peak_memory_gib", output) > 0.05


def test_the_plain_example_shows_the_same_loss_in_less_memory(run):
    output = run("plain_pytorch.py")
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", output)]
    peaks = [float(x) for x in re.findall(r"peak (\d+) MiB", output)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    assert peaks[1] < 0.5 * peaks[0]
    assert peaks[1] < peaks[2] < peaks[0]
    assert peaks[3] == peaks[0]


def test_the_fine_tuning_example_saves_a_model_that_loads_and_writes(run, tmp_path):
    pytest.importorskip("datasets")
    output = run("finetune_documents.py")
    before, after, loaded = held_out_losses(output)
    assert after < before - 0.3
    assert loaded == after
    assert len(re.search(r"it writes: 'import (.+)'", output)[1]) > 10
    assert (tmp_path / "finetuned" / "model.safetensors").is_file()
    assert (tmp_path / "finetuned" / "tokenizer.json").is_file()


def test_the_lora_example_saves_adapters_that_load_onto_the_base(run, tmp_path):
    pytest.importorskip("peft")
    output = run("lora.py")
    before, after, loaded = held_out_losses(output)
    assert after < before - 0.05
    assert loaded == after
    assert not list((tmp_path / "adapter").glob("model*"))
    assert value("adapter", output) < 500  # KiB; the base takes 1.3 MiB


def test_the_qlora_example_trains_adapters_on_4_bit_weights(run):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    output = run("qlora.py")
    before, after = (float(x) for x in re.findall(r"([\d.]+) MiB", output))
    assert after < 0.5 * before
    assert re.search(r"LlamaMLP +M = 4", output)
    assert value("train_loss", output) < 6.5  # random guesses: 6.9


def test_the_ddp_example_trains_one_set_of_weights_on_two_processes(run):
    output = run("ddp_trainer.py")
    assert "devices: 2, with equal weights: True" in output
    before, after = held_out_losses(output)
    assert after < before - 0.3


def test_the_sharded_example_trains_on_two_processes(run):
    output = run("sharded_trainer.py")
    assert "FSDPLlamaDecoderLayer" in output
    assert value("train_loss", output) < 8
    assert value("peak_memory_gib", output) > 0.05


def test_the_sweep_example_leaves_a_table_a_page_and_a_picture(run, tmp_path):
    pytest.importorskip("matplotlib")
    run("sweep.sh")
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "sweep").glob("*/result.json"))]
    assert [result["status"] for result in results] == ["completed"] * 4
    peaks = [result["peak_memory_gib"] for result in results]  # M = 1 in fp32 and bf16, then M = 4
    assert peaks[2] < 0.8 * peaks[0]
    assert peaks[3] < 0.8 * peaks[1]
    for name in ("report.csv", "report.md", "report.png"):
        assert (tmp_path / "sweep" / name).stat().st_size > 0


def test_the_command_line_example_trains_and_leaves_its_settings_as_yaml(run, tmp_path):
    pytest.importorskip("jsonargparse")
    output = run("lightning_cli.py")
    assert re.search(r"LlamaMLP +M = 4", output)
    assert value("val_loss", output) < 5.9  # random guesses: 6.2
    (file,) = tmp_path.glob("lightning_logs/version_0/config.yaml")
    assert f"again: python lightning_cli.py fit --config {file}" in output.replace("\n", "")
    (callback,) = yaml.safe_load(file.read_text())["trainer"]["callbacks"]
    assert callback["class_path"] == "lightning_mst.MSTCallback"
    assert callback["init_args"]["mlp_chunks"] == 4


def test_the_transformers_trainer_example_evaluates_without_forming_logits(run):
    pytest.importorskip("accelerate")
    output = run("hf_trainer.py")
    before, after, standard = held_out_losses(output)
    assert after < before - 0.3
    assert standard == pytest.approx(after, abs=2e-4)
    assert output.count(MATERIALIZED) == 0


def test_the_example_of_a_model_of_ones_own_has_perplexity_without_forming_logits(run):
    output = run("own_model.py")
    assert re.search(r"MLP +2 x model.layers.\*.mlp +MLP +M = 4", output)
    assert "MSTCallback verified the first batch" in output
    before, after = (float(x) for x in re.search(r"perplexity: ([\d.]+) before, ([\d.]+) after", output).groups())
    assert after < 0.6 * before
    assert output.count(MATERIALIZED) == 0


def test_every_example_is_tested_and_listed():
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
    assert names == set(re.findall(r"run\(\"(\w+\.\w+)\"", Path(__file__).read_text()))
    assert all(f"`{name}`" in (EXAMPLES / "README.md").read_text() for name in names)
