"""The experiments of lengths, throughput and breakdown, by the command that runs them."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from lightning_mst.cli import main
from lightning_mst.configurations import conf_dir, names_of
from lightning_mst.experiments import fitting
from lightning_mst.experiments.search import largest
from lightning_mst.memory.devices import DEVICES
from lightning_mst.program.plan_measure import Measured
from lightning_mst.units import GIB

TASKS = {
    "max_length": "longest",
    "max_length_accumulation": "longest",
    "max_length_quantized": "longest",
    "throughput": "throughput",
    "throughput_llama2": "throughput",
    "breakdown": "breakdown",
}
TINY = [
    "trainer=cpu",
    "data.sequence_length=100",
    "model.config.vocab_size=512",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=2",
]


@pytest.fixture
def measure(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``measure(*overrides)`` runs a task in this process and gives back its result.json."""

    def run(*overrides: str) -> dict[str, Any]:
        main(["train", *TINY, f"hydra.run.dir='{tmp_path}'", "task.how=measured", *overrides])
        return json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))

    return run


@pytest.mark.parametrize("limit", [0, 31, 32, 100, 4999, 5000, 5049, 5050, 9000])
@pytest.mark.parametrize("grain", [1, 50])
@pytest.mark.parametrize("start", [0, 50, 5000])
def test_the_largest_number_is_found_from_any_start_to_within_a_grain(limit, grain, start):
    tried: list[int] = []
    found = largest(lambda n: tried.append(n) or n <= limit, start=start, grain=grain, least=32)  # type: ignore[func-returns-value]

    if limit < 32:
        assert found == 0
    else:
        assert max(31, limit - grain) < found <= limit or found == limit
    assert len(tried) == len(set(tried)) <= 2 + 2 * 14


def test_a_start_that_is_right_takes_two_tries():
    tried: list[int] = []
    assert largest(lambda n: tried.append(n) or n <= 1005, start=1000, grain=10) == 1000  # type: ignore[func-returns-value]
    assert tried == [1000, 1010]


@pytest.mark.parametrize("mst", ["off", "auto"])
def test_the_longest_sequence_fits_and_a_slightly_longer_one_does_not(measure, mst):
    found = measure("task=longest", "task.memory=8MiB", f"mst={mst}")

    assert (found["how"], found["mst_name"], found["memory_gib"]) == ("measured", mst, 8 / 1024)
    assert 0.98 * found["memory_gib"] < found["peak_gib"] <= found["memory_gib"]
    longer = measure("task=breakdown", f"mst={mst}", f"data.sequence_length={round(1.02 * found['longest'])}")
    assert longer["measured_peak_gib"] > found["memory_gib"]


def test_a_prediction_is_what_is_measured_within_a_percent(measure):
    run = ["task=longest", "task.memory=8MiB", "mst=recompute"]
    measured, predicted = measure(*run), measure(*run, "task.how=predicted")

    assert (measured["how"], predicted["how"]) == ("measured", "predicted")
    assert predicted["longest"] == pytest.approx(measured["longest"], rel=0.011)
    assert predicted["peak_gib"] == pytest.approx(measured["peak_gib"], rel=0.011)


def test_nothing_fits_a_device_that_is_too_small_for_the_model(measure):
    for how in ("measured", "predicted"):
        found = measure("task=longest", "task.memory=100KiB", f"task.how={how}")
        assert (found["longest"], found["peak_gib"]) == (0, None)
        found = measure("task=throughput", "task.memory=100KiB", f"task.how={how}", "task.batch=largest")
        unmeasured = ("batch_size", "seconds_per_step", "tokens_per_second", "peak_gib")
        assert not found["fits"]
        assert all(found[key] is None for key in unmeasured)


def test_a_try_that_runs_out_of_memory_does_not_fit_and_leaves_nothing_behind(measure, monkeypatch):
    models: list[weakref.ref] = []

    def run_steps(build_model, training, step, config, device) -> Measured:
        assert not any(model() for model in models)
        cycle = [build_model()]  # as a rewritten model is one
        models.append(weakref.ref(cycle[0]))
        cycle.append(cycle)
        if step.batch["input_ids"].shape[1] > 50:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Measured(GIB // 1024)

    monkeypatch.setattr(fitting, "run_steps", run_steps)
    found = measure("task=longest", "task.memory=8MiB")

    assert 40 < found["longest"] <= 50
    assert found["peak_gib"] == 1 / 1024
    assert len(models) > 3


def test_the_allocator_is_held_to_what_a_smaller_gpu_would_leave_it_and_let_go_again(monkeypatch):
    shares = [0.9]
    monkeypatch.setattr(torch.cuda.memory, "get_per_process_memory_fraction", lambda: shares[-1])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GIB))

    with pytest.raises(ZeroDivisionError), fitting.limited_to(20 * GIB, torch.device("cuda")):
        raise ZeroDivisionError
    with fitting.limited_to(100 * GIB, torch.device("cuda")):
        pass

    assert shares == [0.9, (20 * GIB - DEVICES["cuda"].overhead) / (80 * GIB), 0.9, 0.9, 0.9]


def test_the_largest_batch_fits_and_is_timed_and_a_larger_one_is_a_result_without_numbers(measure):
    run = ["task=throughput", "task.memory=8MiB", "task.warmup_steps=0", "task.timed_steps=1", "mst=off"]
    found = measure(*run, "task.batch=largest")

    assert found["fits"]
    assert found["batch_size"] > 1
    assert found["tokens_per_second"] == pytest.approx(100 * found["batch_size"] / found["seconds_per_step"])
    assert found["peak_gib"] <= found["memory_gib"]
    more = measure(*run, f"task.batch={found['batch_size'] + 1}")
    assert (more["fits"], more["batch_size"], more["seconds_per_step"], more["peak_gib"]) == (False, None, None, None)
    predicted = measure(*run, f"task.batch={found['batch_size']}", "task.how=predicted")
    assert (predicted["fits"], predicted["seconds_per_step"]) == (True, None)
    assert predicted["peak_gib"] == pytest.approx(found["peak_gib"], rel=0.01)


def test_the_kinds_of_a_breakdown_add_up_to_the_predicted_peak_which_is_the_measured_one(measure):
    gradients = {}
    for optimizer in ("adamw", "adamw_in_backward"):
        found = measure("task=breakdown", f"optimizer={optimizer}", "mst=off", "data.sequence_length=8")

        kinds = found["kinds_gib"]
        assert sum(kinds.values()) == pytest.approx(found["peak_gib"])
        assert found["measured_peak_gib"] == pytest.approx(found["peak_gib"], rel=0.01)
        assert found["where"].split()[0] in ("forward", "backward", "optimizer")
        assert kinds["optimizer_states"] == pytest.approx(2 * kinds["weights"], rel=0.01)
        assert (found["optimizer"], found["how"]) == (optimizer, "measured")
        gradients[optimizer] = kinds["gradients"] / kinds["weights"]
    assert gradients["adamw"] == pytest.approx(1)
    assert gradients["adamw_in_backward"] < 0.6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=longest"], "task.memory: No GPU was found to ask for its memory"),
        (["task=longest", "task.memory=much"], "task.memory: 'much' is not an amount of memory"),
        (["task=longest", "task.how=guessed"], "task.how: should be auto, measured or predicted, got 'guessed'"),
        (["task=breakdown", "trainer=gpu"], "task.how: No GPU was found to measure on. Add trainer=cpu"),
        (["task=breakdown", "trainer.devices=2"], "task=breakdown runs on one device, got 2"),
        (["task=throughput", "task.batch=0"], "task.batch should be a whole number, 1 or more, or 'largest'; got 0"),
        (["task=throughput", "task.timed_steps=0"], "task.timed_steps should be a whole number, 1 or more; got 0"),
        (["task=throughput", "trainer.accumulate_grad_batches=2"], "times whole steps on one batch, got 2"),
    ],
)
def test_what_cannot_be_done_is_told_before_anything_runs(measure, capsys, monkeypatch, overrides, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        measure(*overrides)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("size", ["paper", "smoke"])
@pytest.mark.parametrize("name", TASKS)
def test_an_experiment_composes_and_sweeps_over_what_there_is(size, name):
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=[f"experiment={size}/{name}"], return_hydra_config=True)

    swept = {key: values.split(",") for key, values in config.hydra.sweeper.params.items()}
    assert config.task.name == TASKS[name]
    assert config.trainer.accelerator == {"paper": "gpu", "smoke": "cpu"}[size]
    assert config.task.how == {"paper": "auto", "smoke": "measured"}[size]
    assert {"off", "paper", "auto"} <= {*swept["mst"], "off"}
    for key, values in swept.items():
        assert key == "task.batch" or set(values) <= set(names_of(key))
