"""Several runs, one table."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from lightning_mst.cli import main
from lightning_mst.program.sweep import read_sweep


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_sweep_of_two_by_two_leaves_one_row_per_run(tiny, tmp_path, capsys):
    swept = ["mst.mlp_chunks=1,2", "precision=32-true,bf16-true"]
    main(["train", "-m", *tiny, f"hydra.sweep.dir='{tmp_path}'", *swept])

    rows = read_csv(tmp_path / "sweep.csv")
    assert [(row["run"], row["mst.mlp_chunks"], row["precision"]) for row in rows] == [
        ("0", "1", "32-true"),
        ("1", "1", "bf16-true"),
        ("2", "2", "32-true"),
        ("3", "2", "bf16-true"),
    ]
    for row in rows:
        result = json.loads((tmp_path / row["run"] / "result.json").read_text(encoding="utf-8"))
        assert row["status"] == "completed"
        for key in ("loss", "val_perplexity", "tokens_per_second", "peak_memory_gib"):
            assert float(row[key]) == result[key] > 0
    assert "data.sequence_length" not in rows[0]  # the same in all runs
    text = capsys.readouterr().out
    assert "Sweep: " in text
    assert "Training run" not in text  # one table instead of four summaries


def test_a_failed_run_leaves_a_row_and_the_rest_still_runs(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "-m", *tiny, f"hydra.sweep.dir='{tmp_path}'", "model.config.hidden_size=33,32"])

    assert exit_info.value.code == 1
    failed, completed = read_csv(tmp_path / "sweep.csv")
    assert (failed["status"], failed["loss"]) == ("failed", "")
    assert "The hidden size (33)" in failed["error"]
    assert completed["status"] == "completed"
    assert float(completed["loss"]) > 0
    assert "1 of 2 runs failed: 0 in" in capsys.readouterr().err


def test_a_real_error_in_a_sweep_is_logged_with_its_stack_trace(tiny, tmp_path, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr("lightning_mst.models.from_config", broken)
    with pytest.raises(SystemExit):
        main(["train", "-m", *tiny, f"hydra.sweep.dir='{tmp_path}'", "seed=1,2"])

    log = (tmp_path / "1" / "train.log").read_text(encoding="utf-8")
    assert "Traceback" in log
    assert "RuntimeError: the disk is on fire" in log


def job(folder: Path, overrides: list[str], number: int, result: dict | None) -> None:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {item}\n" for item in overrides))
    (folder / ".hydra" / "hydra.yaml").write_text(f"hydra:\n  job:\n    num: {number}\n")
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))


def test_a_run_that_died_without_a_word_counts_as_failed(tmp_path):
    job(tmp_path / "b", ["mst=auto", "seed=0"], 0, {"status": "completed", "loss": 1.0})
    job(tmp_path / "a", ["mst=off", "seed=0"], 1, None)

    rows = read_sweep(tmp_path)

    assert [(row["run"], row["mst"], row["status"], row["loss"]) for row in rows] == [
        ("b", "auto", "completed", 1.0),
        ("a", "off", "failed", None),
    ]
    assert "seed" not in rows[0]


def test_runs_are_in_the_order_of_their_numbers_and_may_lie_deep(tmp_path):
    for number in range(12):
        job(tmp_path / "x" / str(number), [f"seed={number}"], number, {"status": "completed"})

    assert [row["seed"] for row in read_sweep(tmp_path)] == [str(number) for number in range(12)]


def test_runs_of_an_earlier_sweep_in_the_same_folder_are_left_out(tmp_path):
    job(tmp_path / "0", ["seed=0"], 0, {"status": "completed"})
    job(tmp_path / "1", ["seed=1"], 1, {"status": "completed"})
    os.utime(tmp_path / "1" / ".hydra" / "overrides.yaml", (100, 100))

    assert [row["run"] for row in read_sweep(tmp_path, since=200)] == ["0"]


def test_a_sweep_whose_processes_something_else_starts_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # as torchrun does
    with pytest.raises(SystemExit):
        main(["train", "-m", *tiny, f"hydra.sweep.dir='{tmp_path}'", "trainer.devices=2", "seed=0,1"])

    assert "without torchrun or srun" in read_csv(tmp_path / "sweep.csv")[0]["error"]
