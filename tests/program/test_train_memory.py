"""A run that shows where its memory went."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment

from lightning_mst.program.results import read_result
from lightning_mst.training import timeline


def test_a_run_tells_where_its_peak_was(train, tmp_path, capsys):
    result = train("callbacks.mst.log_memory=tensors", "model.config.intermediate_size=4096")

    assert result["peak_memory_where"] == "backward of model.model.layers.0, mlp"
    row = next(line for line in capsys.readouterr().out.splitlines() if "peak memory (GiB)" in line)
    assert "backward of model.model.layers.0, mlp" in row
    with (tmp_path / "run" / "csv" / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["peak_memory_gib"]]
    assert len(rows) == 2
    for row in rows:
        phases = [float(row[f"peak_memory_{phase}_gib"]) for phase in ("forward", "backward", "optimizer")]
        assert float(row["peak_memory_gib"]) == max(phases)


def test_a_run_without_callbacks_does_not_know(train):
    assert train("callbacks=none")["peak_memory_where"] is None


def test_one_option_draws_the_memory_of_a_step_into_the_runs_folder(train, tmp_path):
    pytest.importorskip("matplotlib")
    train("callbacks.mst.memory_timeline=true")

    drawn = json.loads((tmp_path / "run" / "memory_timeline.json").read_text(encoding="utf-8"))
    assert [(each["form"], each["source"]) for each in drawn["timelines"]] == [
        ("standard", "modelled"),
        ("mini-sequences", "measured"),
    ]
    assert "first step" not in drawn["note"]
    assert (tmp_path / "run" / "memory_timeline.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_run_ends_before_it_trains(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timeline, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        train("callbacks.mst.memory_timeline=true")
    failure = read_result(tmp_path / "run")
    assert failure["error"].startswith("ConfigurationError: memory_timeline=True draws a figure with matplotlib")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["mst_model_parallel", "mst_ddp_spawn"])
def test_several_processes_log_the_same_and_draw_what_can_be_measured(tiny, tmp_path, strategy):
    pytest.importorskip("matplotlib")
    overrides = [f"strategy={strategy}", "trainer.devices=2", "callbacks.mst.memory_timeline=true"]
    overrides += ["callbacks.mst.log_memory=tensors"] if strategy == "mst_model_parallel" else []
    command = [sys.executable, "-m", "lightning_mst", "train", *tiny, f"hydra.run.dir='{tmp_path}'", *overrides]
    env = environment(PYTHONPATH=str(Path(__file__).parent))
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)

    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path)
    assert result["peak_memory_where"] is not None
    drawn = json.loads((tmp_path / "memory_timeline.json").read_text(encoding="utf-8"))
    (measured,) = drawn["timelines"]
    assert {visit["group"] for visit in measured["visits"]} >= {"attention", "MLP", "LM head"}
    assert "The standard form can't be modelled: " in drawn["note"]
    if strategy == "mst_model_parallel":
        assert "No prediction of the peak memory" in done.stderr + done.stdout
        assert result["peak_memory_gib"] < 0.1  # of tensors; the process itself takes more
