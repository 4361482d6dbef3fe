"""The benchmarks measure what they say: every contestant, tiny, in this process."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu, measure
from benchmarks.contest import UNMODIFIED, Contest, hold
from benchmarks.matmuls import Matmuls
from benchmarks.run import SECTIONS, main
from benchmarks.tables import markdown
from lightning_mst.configurations import conf_dir

TOKENS = 2048
ERRORS = {
    "head-cpu": {"loss", "dX", "dW"},
    "mlp-cpu": {"y", "dX", "dW"},
    "losses-cpu": {"loss", "dX", "dW"},
    "step-cpu": {"loss", "dW"},
    "layers-cpu": {"loss", "dW"},
}
TINY = ["--hidden", "32", "--intermediate", "64", "--vocabulary", "512", "--layers", "1", "--head-size", "16"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("results")
    main([*TINY, "--lengths", str(TOKENS), "--runs", "1", "--device", "cpu", "--output", str(folder)])
    return {file.stem: json.loads(file.read_text()) for file in Path(folder).iterdir()}


def rows(result: dict[str, Any], block: str) -> dict[str, dict[str, Any]]:
    return {row["kind"]: row for row in result["rows"] if row["block"] == block}


def test_every_contestant_gets_the_gradients_of_the_unmodified_block(results):
    assert set(results) == set(ERRORS)
    for name, result in results.items():
        assert {"date", "device", "versions", "dtype", "sizes", "skipped"} < set(result)
        for row in result["rows"]:
            assert row["seconds"] > 0
            assert row["peak_bytes"] > 0
            if "bare" in row["kind"]:  # three products, no loss
                assert row["errors"] is None
            else:
                assert set(row["errors"]) == ERRORS[name]
                assert 0 < max(row["errors"].values()) < 1e-5, row


def test_matmuls_are_counted_wherever_they_are_computed(results):
    head, mlp = rows(results["head-cpu"], "LM head"), rows(results["mlp-cpu"], "MLP, checkpointed layer")
    three = ("unmodified", "ours", "three bare matmuls, chunks", "torch chunked", "DeepSpeed")
    assert [head[kind]["passes"] for kind in three] == [3.0] * 5
    assert head["per-chunk checkpoint"]["passes"] == 4.0
    # A recomputed layer stops before its last product; a tiled MLP in it is computed once more.
    passes = {kind: mlp[kind]["passes"] for kind in ("unmodified", "ours", "DeepSpeed")}
    assert passes == {"unmodified": pytest.approx(11 / 3), "ours": pytest.approx(11 / 3), "DeepSpeed": 5.0}


def test_ours_takes_less_memory_than_the_unmodified_block_and_no_more_than_peers(results):
    head, mlp = rows(results["head-cpu"], "LM head"), rows(results["mlp-cpu"], "MLP, checkpointed layer")
    assert head["ours"]["peak_bytes"] < 0.2 * head["unmodified"]["peak_bytes"]
    for block, kind in ((head, "torch chunked, our chunks"), (head, "DeepSpeed"), (mlp, "DeepSpeed")):
        assert block["ours"]["peak_bytes"] <= block[kind]["peak_bytes"]


def test_a_peer_that_cannot_run_is_a_line_under_the_table_that_says_why(results):
    result = results["head-cpu"]
    skipped = {entry["kind"]: entry["reason"] for entry in result["skipped"]}
    assert set(skipped) >= {"Apple", "Liger"}
    assert all(re.search("not installed: pip install|need a CUDA device", reason) for reason in skipped.values())
    assert f"Liger ({skipped['Liger']})" in markdown(result)


def contest(**peers: Any) -> Contest:
    x = torch.ones(8, requires_grad=True)

    def step() -> Tensor:
        y = (2 * x).sum()
        y.backward()
        return y.detach()

    return Contest(
        block="a block",
        length=8,
        leaves=[x],
        forward_multiply_adds=1,
        contestants={UNMODIFIED: lambda: step},
        peers=peers,
        values=lambda y: {"y": [y], "dX": [x.grad]},
        expected=lambda: {"y": [torch.tensor(16.0).double()], "dX": [torch.full((8,), 4.0).double()]},
    )


def test_an_error_is_the_norm_of_the_difference_and_what_a_peer_raises_is_a_reason():
    def fails() -> measure.Step:
        raise TypeError("no such kernel\nand more")

    def too_large() -> measure.Step:
        raise torch.OutOfMemoryError

    done, skipped = hold(contest(broken=fails, large=too_large), budget=0, runs=1)
    assert skipped == [{"block": "a block", "kind": "broken", "reason": "TypeError: no such kernel"}]
    ours, large = done
    assert ours["errors"] == {"y": 0.0, "dX": 0.5}
    assert (ours["runs"], large["runs"], large["seconds"]) == (1, 0, None)
    result = {"date": "", "device": "", "versions": {}, "dtype": "", "sizes": {}, "rows": done, "skipped": skipped}
    assert "| large | out of memory |" in markdown(result)
    assert "| unmodified | 0.00 s / 0 MiB | \N{EN DASH} | 5.0e-01 |" in markdown(result)


def test_repetitions_take_turns_and_end_with_the_time():
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    assert [len(times) for times in measure.seconds(steps, [], budget=60, runs=3).values()] == [3, 3]
    assert order == list("ababab")
    assert [len(times) for times in measure.seconds(steps, [], budget=0, runs=3).values()] == [1, 1]


def test_a_product_is_counted_once_however_it_is_written():
    a, b, sum_ = torch.ones(2, 3), torch.ones(3, 5), torch.zeros(2, 5)
    with Matmuls() as counted:
        for _ in (a @ b, torch.addmm(sum_, a, b), sum_.addmm_(a, b), torch.mm(a, b, out=sum_)):
            pass
        torch.nn.functional.linear(a, b.t())
        torch.bmm(a[None], b[None])
    assert counted.multiply_adds == 6 * 2 * 3 * 5


def test_every_part_of_the_gpu_run_asks_for_what_there_is():
    commands = gpu.parts(Path("outputs"))
    assert {"tests", "planner", "timeline", "throughput-auto", "max-length-gemma2_9b-off-recompute"} < set(commands)
    for name, (_, module, *arguments) in commands.items():
        if module == "benchmarks.run":
            assert set(arguments) <= set(SECTIONS), name
        for key, _, values in (argument.partition("=") for argument in arguments if module == "lightning_mst"):
            if key in ("experiment", "model", "mst", "precision"):
                for value in values.split(","):
                    assert (conf_dir() / key / f"{value}.yaml").is_file(), (name, value)


def test_a_part_that_fails_or_takes_too_long_is_told_and_not_the_end(monkeypatch):
    monkeypatch.setattr(gpu, "LIMIT", 0.5)
    commands = {"good": "pass", "bad": "raise SystemExit(3)", "slow": "import time; time.sleep(9)"}
    ended = {name: gpu.run(name, ["-S", "-c", code])["ended"] for name, code in commands.items()}
    assert ended == {"good": "well", "bad": "failed with exit code 3", "slow": "stopped after 0.5 s"}
