"""Runs that are killed: what is left of them, and where they get to once they are resumed."""

from __future__ import annotations

import random
import runpy
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import resume_script as script
import torch
from processes import environment
from transformers import AutoModelForCausalLM

from lightning_mst.causal_lm import CausalLM

pytestmark = pytest.mark.slow

KILLS = {"single": ["single"], "ddp": ["ddp 0 1", "ddp 0", "ddp 1"], "fsdp2": ["fsdp2 1"]}
STRATEGIES = [*KILLS, "fsdp2 in one file"]


@dataclass
class Launch:
    """How a launched program ended: all of its processes, since they share the pipe that is read to its end."""

    returncode: int
    output: str
    seconds: float


def launch(folder: Path, *arguments: str) -> Launch:
    command = [sys.executable, script.__file__, str(folder), *arguments]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    output, _ = process.communicate(timeout=300)
    return Launch(process.returncode, output, time.monotonic() - start)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    words = random.Random(0)
    (path / "texts").mkdir()
    for number in range(60):
        text = " ".join("".join(words.choices("abcdefgh", k=words.randint(1, 6))) for _ in range(200))
        (path / "texts" / f"{number}.txt").write_text(text)
    script.data(path, 1)  # so that the processes find tokenizer and tokens in the cache
    return path


@pytest.fixture(scope="module")
def killed(folder: Path) -> dict[str, Launch]:
    names = [name for kills in KILLS.values() for name in kills]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(lambda name: launch(folder, *name.split()), names), strict=True))


@pytest.fixture(scope="module")
def finals(folder: Path, killed: dict[str, Launch]) -> dict[str, dict[str, Any]]:
    """Name -> the checkpoint at the end of each run that was not killed."""
    script.compare(folder, "single", "single killed")
    in_one_file = "fsdp2 in one file=fsdp2 in one file whole"
    ended = launch(folder, "compare", "ddp=ddp killed 0 1", "fsdp2=fsdp2 killed 1", in_one_file)
    assert ended.returncode == 0, ended.output[-3000:]
    names = ("whole", "resumed", "without", "with again", "cosine", "cosine resumed")
    runs = [f"{strategy} {run}" for strategy in STRATEGIES for run in names]
    return {run: load(folder / run / "final.ckpt") for run in runs}


def load(path: Path) -> dict[str, Any]:
    """A checkpoint as one dictionary, read without trust; a distributed one by Lightning's own tool."""
    if path.is_dir():
        consolidated = path.with_suffix(".consolidated")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["consolidate", str(path), "--output_file", str(consolidated)])
            # The one in lightning.pytorch expects the keys of FSDP1's checkpoints.
            runpy.run_module("lightning.fabric.utilities.consolidate_checkpoint", run_name="__main__")
        path = consolidated
    return torch.load(path, weights_only=True)


def check_same(actual: Any, expected: Any, name: str) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), name
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), name
        for key in expected:
            check_same(actual[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), name
        for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
            check_same(one, other, f"{name}.{index}")
    else:
        assert actual == expected, name


@pytest.mark.parametrize(("first", "second"), [("whole", "resumed"), ("cosine", "cosine resumed")])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_run_resumes_bit_for_bit(finals: dict[str, Any], strategy: str, first: str, second: str) -> None:
    whole, resumed = finals[f"{strategy} {first}"], finals[f"{strategy} {second}"]
    assert whole["global_step"] == script.STEPS
    # All but where ModelCheckpoint keeps its files: weights, optimizer, loops, random states of every rank.
    assert len([key for key in whole if key.startswith("optimizer")]) == 1
    assert len(whole["random_states"]) == (1 if strategy == "single" else 2)
    check_same({**resumed, "callbacks": None}, {**whole, "callbacks": None}, strategy)


def test_every_rank_has_dropout_of_its_own(finals: dict[str, Any]) -> None:
    first, second = finals["ddp whole"]["random_states"]
    assert not torch.equal(first["cpu"], second["cpu"])


@pytest.mark.parametrize("strategy", KILLS)
def test_a_kill_leaves_the_checkpoints_before_it(folder: Path, killed: dict[str, Launch], finals: Any, strategy: str):
    expected = load(folder / f"{strategy} whole" / f"step={script.LAST_CHECKPOINT}.ckpt")
    for name in KILLS[strategy]:
        assert killed[name].returncode != 0
        run = folder / name.replace(strategy, f"{strategy} killed", 1)
        found = load(run / f"step={script.LAST_CHECKPOINT}.ckpt")
        check_same({**found, "callbacks": None}, {**expected, "callbacks": None}, name)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before_it(folder: Path, killed: dict[str, Launch]) -> None:
    run = folder / "single killed"
    with pytest.raises(RuntimeError, match="PytorchStreamReader"):
        load(run / f"step={script.KILLED_IN_STEP}.ckpt")
    assert load(run / f"step={script.LAST_CHECKPOINT}.ckpt")["global_step"] == script.LAST_CHECKPOINT


@pytest.mark.parametrize("name", ["ddp 0", "ddp 1", "fsdp2 1"])
def test_when_one_rank_is_killed_the_other_ends_with_a_message(killed: dict[str, Launch], name: str) -> None:
    survivor, output = 1 - int(name[-1]), killed[name].output
    lost_connection = f"[rank{survivor}]: RuntimeError" in output and "Connection" in output
    # Lightning looks every five seconds for processes that it started and that have died.
    assert lost_connection or "Child process with PID" in output, output[-2000:]
    assert killed[name].seconds < killed["ddp 0 1"].seconds + 60


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpoints_written_with_mini_sequences_load_without_them_and_the_reverse(
    folder: Path, finals: dict[str, Any], strategy: str
) -> None:
    whole = finals[f"{strategy} whole"]["state_dict"]
    for run in (f"{strategy} without", f"{strategy} with again"):
        resumed = finals[run]
        assert resumed["state_dict"].keys() == whole.keys()
        for name, weight in resumed["state_dict"].items():
            torch.testing.assert_close(weight, whole[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpoints_go_into_transformers(folder: Path, finals: dict[str, Any], strategy: str, tmp_path: Path) -> None:
    path = folder / f"{strategy} whole" / ("final.consolidated" if strategy == "fsdp2" else "final.ckpt")
    module = CausalLM.load_from_checkpoint(path, model=script.llama(seed=9))
    module.model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, module.model.eval()(ids).logits)
    weights = model.state_dict()
    for name, weight in finals[f"{strategy} whole"]["state_dict"].items():
        assert torch.equal(weights[name.removeprefix("model.")], weight), name


def test_another_number_of_ranks_is_said_once_and_trains_on(
    folder: Path, finals: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    script.train(folder, "single", "from two", resume=folder / "ddp whole" / "step=8.ckpt")
    messages = [str(warning.message) for warning in recwarn]
    assert sum("written by 2 processes, now there are 1" in message for message in messages) == 1
    assert sum("processes: 2 then, 1 now" in message for message in messages) == 1
    assert load(folder / "from two" / "final.ckpt")["global_step"] == script.STEPS


def test_random_states_are_taken_from_the_checkpoint_only_by_a_fit_that_resumes(
    folder: Path, finals: dict[str, Any], tmp_path: Path
) -> None:
    path = folder / "single whole" / "final.ckpt"
    module = CausalLM.load_from_checkpoint(path, model=script.llama())
    batches = script.data(folder, 1)
    trainer = script.trainer_for("single", [], max_steps=1)

    def state_after_start() -> torch.Tensor:
        states: list[torch.Tensor] = []
        module.on_train_epoch_start = lambda: states.append(torch.get_rng_state())
        trainer.fit(module, datamodule=batches)
        return states[0]

    torch.manual_seed(3)
    trainer.validate(module, datamodule=batches, ckpt_path=path, verbose=False)
    torch.manual_seed(3)
    assert torch.equal(state_after_start(), torch.manual_seed(3).get_state())


def test_a_checkpoint_after_an_exception_waits_for_no_other_rank() -> None:
    module = CausalLM(script.llama())
    module._trainer = SimpleNamespace(world_size=2, interrupted=True)  # no process group: gathering would fail
    checkpoint: dict[str, Any] = {"state_dict": {}}
    module.on_save_checkpoint(checkpoint)
    assert "random_states" not in checkpoint


def test_a_checkpoint_without_random_states_resumes(folder: Path, finals: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = dict(torch.load(folder / "single whole" / "step=8.ckpt", weights_only=True))
    del checkpoint["random_states"]
    torch.save(checkpoint, tmp_path / "older.ckpt")
    script.train(folder, "single", "from older", resume=tmp_path / "older.ckpt")
    assert load(folder / "from older" / "final.ckpt")["global_step"] == script.STEPS
