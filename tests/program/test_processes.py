"""Runs of several processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only
from processes import environment
from torch.multiprocessing import ProcessRaisedException

from lightning_mst.cli import main
from lightning_mst.program.own_process import RANK_VARIABLES, run_group
from lightning_mst.program.processes import RankFailed, told_once
from lightning_mst.program.results import read_result, write_failure


def launch(tiny: list[str], folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lightning_mst", "train", *tiny, f"hydra.run.dir='{folder}'", *overrides]
    env = environment(PYTHONPATH=str(Path(__file__).parent))
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_sweep_over_ddp_and_fsdp2_trains_what_one_process_trains(tiny, train, tmp_path, capfd):
    swept = ["strategy=mst_ddp,mst_model_parallel"]
    before = dict(os.environ)
    main(["train", "-m", *tiny, f"hydra.sweep.dir='{tmp_path}/sweep'", "trainer.devices=2", *swept])

    assert {name: os.environ.get(name) for name in RANK_VARIABLES} == {
        name: before.get(name) for name in RANK_VARIABLES
    }
    output = capfd.readouterr()
    assert "Sweep: " in output.out
    assert "Training run" not in output.out
    with (tmp_path / "sweep" / "sweep.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["strategy"], row["status"]) for row in rows] == [
        ("0", "mst_ddp", "completed"),
        ("1", "mst_model_parallel", "completed"),
    ]
    # Two processes with a sequence each see what one process sees in a batch of two. That one is not rewritten.
    one_process = train("data.batch_size=2", "mst=off")
    for row in rows:
        result = read_result(tmp_path / "sweep" / row["run"])
        assert (result["strategy"], result["devices"], result["steps"]) == (row["strategy"], 2, 2)
        assert result["parameters"] == one_process["parameters"]
        assert result["losses"] == pytest.approx(one_process["losses"], rel=1e-5)
        assert result["val_perplexity"] == pytest.approx(one_process["val_perplexity"], rel=1e-5)


@pytest.mark.slow
def test_four_processes_train_fifty_steps_and_one_of_them_speaks(tiny, tmp_path):
    settings = ["strategy=mst_model_parallel", "trainer.devices=4", "trainer.max_steps=50"]
    done = launch(tiny, tmp_path, *settings, "trainer.accumulate_grad_batches=2")

    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path)
    assert (result["devices"], result["steps"], len(result["losses"])) == (4, 50, 50)
    assert result["losses"][-1] < result["losses"][0]
    for said in ("Training run", "4 (mst_model_parallel)", "Mini-sequence form of CausalLM", "step 50: loss"):
        assert done.stdout.count(said) == 1


@pytest.mark.slow
def test_two_processes_go_on_from_their_sharded_checkpoint(tiny, tmp_path):
    settings = ["strategy=mst_model_parallel", "trainer.devices=2", "trainer.max_steps=4", "callbacks=checkpoint"]
    settings += ["optimizer=adamw_in_backward", "callbacks.checkpoint.every_n_train_steps=2"]
    checkpoints = tmp_path / "whole" / "checkpoints"
    for name, more in {
        "whole": ["callbacks.checkpoint.save_top_k=-1"],
        "resumed": [f"ckpt_path='{checkpoints}/step_2.ckpt'"],
    }.items():
        done = launch(tiny, tmp_path / name, *settings, *more)
        assert done.returncode == 0, done.stderr

    assert (checkpoints / "step_2.ckpt").is_dir()
    assert (checkpoints / "last.ckpt").resolve() == checkpoints / "step_4.ckpt"
    whole, resumed = (read_result(tmp_path / name)["losses"] for name in ("whole", "resumed"))
    assert resumed == whole[2:]


@pytest.mark.slow
def test_a_failing_rank_ends_the_run_and_is_named(tiny, tmp_path):
    faulty = f"+callbacks.faulty={{_target_:faulty.Faulty,folder:'{tmp_path}',rank:1}}"
    done = launch(tiny, tmp_path, "strategy=mst_ddp", "trainer.devices=2", faulty)

    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.count("\nRuntimeError: the disk of rank 1 is on fire\n") == 1
    assert "Rank 1 failed: RuntimeError: the disk of rank 1 is on fire" in done.stderr
    assert read_result(tmp_path) == {
        "status": "failed", "error": "RuntimeError: the disk of rank 1 is on fire", "rank": 1
    }  # fmt: skip
    assert not any(is_alive(int(path.read_text())) for path in tmp_path.glob("rank_*.pid"))
    assert len(list(tmp_path.glob("rank_*.pid"))) == 2


@pytest.mark.slow
def test_spawned_processes_hand_their_results_back(tiny, tmp_path):
    done = launch(tiny, tmp_path, "strategy=mst_ddp_spawn", "trainer.devices=2")

    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path)
    assert (result["strategy"], result["devices"], result["steps"], len(result["losses"])) == ("mst_ddp_spawn", 2, 2, 2)
    assert result["val_perplexity"] > 1
    assert result["tokens_per_second"] > 0
    assert result["peak_memory_gib"] > 0
    metrics = (tmp_path / "csv" / "metrics.csv").read_text(encoding="utf-8")
    assert "train_loss" in metrics  # validation, in processes of its own, has not begun the file anew


def test_the_main_process_tells_of_what_happens_to_all(tmp_path, monkeypatch):
    def failing(rank: int, error: Exception) -> BaseException:
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        with pytest.raises((Exception, SystemExit)) as info, told_once(tmp_path):
            raise error
        return info.value

    monkeypatch.setattr("lightning_mst.program.processes.GRACE", 0.2)
    first = RuntimeError("of rank 2")
    assert failing(2, first) is first
    assert read_result(tmp_path) == {"status": "failed", "error": "RuntimeError: of rank 2", "rank": 2}
    quiet = failing(1, RuntimeError("connection closed by peer"))
    assert isinstance(quiet, SystemExit)
    assert quiet.code == 1
    names_it = RankFailed("Rank 2 failed: RuntimeError: of rank 2")
    assert failing(0, names_it) is names_it
    assert read_result(tmp_path)["rank"] == 2


def test_another_process_waits_for_the_main_one_to_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    timer = threading.Timer(0.3, write_failure, (tmp_path, "ConfigurationError: wrong for all"))
    timer.start()

    with pytest.raises(SystemExit), told_once(tmp_path):
        raise ValueError("wrong for all")

    timer.join()
    assert read_result(tmp_path)["rank"] == 0


def test_the_error_of_a_spawned_process_is_its_last_line(tmp_path):
    message = "\n\n-- Process 3 terminated with the following error:\nTraceback ...\nRuntimeError: no memory\n"
    with pytest.raises(ProcessRaisedException), told_once(tmp_path):
        raise ProcessRaisedException(message, 3, 1234)

    assert read_result(tmp_path) == {"status": "failed", "error": "RuntimeError: no memory", "rank": 3}


# Starts a process of its own, which would outlive it; both ignore the first signal that they get.
STUBBORN = """
import pathlib, os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
path = pathlib.Path(sys.argv[1])
path.with_suffix(".new").write_text(f"{os.getpid()} {child.pid}")
path.with_suffix(".new").rename(path)
if len(sys.argv) > 2:
    sys.exit(int(sys.argv[2]))
time.sleep(60)
"""


def pids(path: Path) -> list[int]:
    return [int(pid) for pid in path.read_text().split()]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
def test_a_terminated_sweep_leaves_no_process_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_mst.program.own_process.PATIENCE", 0.5)
    path = tmp_path / "pids"

    def terminate() -> None:
        wait_for(path.exists)
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    killer = threading.Thread(target=terminate)
    killer.start()
    with pytest.raises(SystemExit) as info:
        run_group([sys.executable, "-c", STUBBORN, str(path)], os.environ, cwd=str(tmp_path))
    killer.join()

    assert info.value.code == 128 + signal.SIGTERM
    wait_for(lambda: not any(is_alive(pid) for pid in pids(path)))
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
def test_a_job_that_fails_takes_the_processes_that_it_started_along(tmp_path):
    path = tmp_path / "pids"

    assert run_group([sys.executable, "-c", STUBBORN, str(path), "3"], os.environ, cwd=str(tmp_path)) == 3
    wait_for(lambda: not any(is_alive(pid) for pid in pids(path)))


def test_a_result_is_json_that_any_reader_takes(tmp_path):
    assert write_failure(tmp_path, "first")
    assert not write_failure(tmp_path, "second", 1)

    assert json.loads((tmp_path / "result.json").read_text()) == {"status": "failed", "error": "first", "rank": 0}
