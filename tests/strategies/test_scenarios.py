"""What differs or goes wrong between ranks: lengths, labels, settings, memory, and a rank that fails."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import environment
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from cases import RANKS, build  # noqa: E402
from run_scenarios import SCENARIOS, batches  # noqa: E402
from test_exactness import distance  # noqa: E402


def launch(file: Path, *names: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "run_scenarios.py"), str(file), *names]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=HERE, env=environment())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks wrote down of all scenarios."""
    file = tmp_path_factory.mktemp("scenarios") / "results"
    done = launch(file, *SCENARIOS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [torch.load(f"{file}.{rank}") for rank in range(RANKS)]


def expected(steps: list[list[Tensor]], *, by_token: bool) -> list[dict[str, Tensor]]:
    """Each step's gradients by plain PyTorch in fp64.

    Args:
        steps: the sequences of all ranks and micro-batches of each step, whose labels all count.
        by_token: whether every token counts alike, or every sequence.
    """
    model = build().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    gradients = []
    for rows in steps:
        losses = []
        for ids in rows:
            logits = model(input_ids=ids, use_cache=False).logits
            losses.append(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
        counts = [ids.shape[1] - 1 for ids in rows]
        if by_token:
            loss = sum(losses) / sum(counts)
        else:
            loss = sum(loss / count for loss, count in zip(losses, counts, strict=True)) / len(rows)
        optimizer.zero_grad()
        loss.backward()
        gradients.append({f"model.{name}": p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    return gradients


def ids(*lengths: int) -> list[Tensor]:
    return [row for row, _ in batches(*lengths)]


@pytest.mark.parametrize(
    ("name", "chunks", "reductions"),
    [("lengths, DDP", [8, 6], [1, 1]), ("lengths, FSDP2", [8, 6], [1, 1]), ("lengths, a number", [6, 6], [0, 0])],
)
def test_ranks_with_different_lengths_use_the_same_number_of_mini_sequences(
    results: list[dict[str, Any]], name: str, chunks: list[int], reductions: list[int]
) -> None:
    """Half of the chunks are the forward pass's; a number needs no agreement, and a rule one all-reduce a step."""
    long, short = ids(64, 48), ids(20, 2)
    wanted = expected([[long[0], short[0]], [long[1], short[1]]], by_token=False)
    for rank in range(RANKS):
        result = results[rank][name]
        assert "error" not in result, result["error"]
        assert result["chunks"] == chunks
        assert result["reductions"] == reductions
        assert distance(result["gradients"], wanted) < 1e-5


@pytest.mark.parametrize("name", ["no labels, DDP", "no labels, FSDP2"])
def test_a_rank_without_a_label_that_counts_adds_nothing(results: list[dict[str, Any]], name: str) -> None:
    wanted = expected([[row] for row in ids(21, 22)], by_token=True)
    for rank in range(RANKS):
        result = results[rank][name]
        assert "error" not in result, result["error"]
        assert distance(result["gradients"], wanted) < 1e-5


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith("out of memory")])
def test_a_step_that_runs_out_of_memory_on_one_rank_is_repeated_on_all(
    results: list[dict[str, Any]], name: str
) -> None:
    first, second = ids(21, 22, 23, 24), ids(23, 24, 25, 26)
    wanted = expected([first[:2] + second[:2], first[2:] + second[2:]], by_token=True)
    assert results[1][name]["out_of_memory"] == 2  # 12 tokens to a mini-sequence, then 6, then 7
    for rank in range(RANKS):
        result = results[rank][name]
        assert "error" not in result, result["error"]
        assert result["factors"][-1] == 4
        assert distance(result["gradients"], wanted) < 1e-5


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("different settings", r"rank 0 has MSTConfig\(mlp_chunks=2"),
        ("retry when sharded", "can't repeat a step under MSTModelParallelStrategy"),
        ("split tie", "ties its LM head to its embedding, but fully_shard made two weights"),
    ],
)
def test_what_can_not_work_is_refused_on_every_rank(results: list[dict[str, Any]], name: str, text: str) -> None:
    for rank in range(RANKS):
        assert results[rank][name]["class"] == "MisconfigurationException"
        assert re.search(text, results[rank][name]["message"])


def test_a_rank_that_fails_ends_the_run_with_its_message(tmp_path: Path) -> None:
    start = time.monotonic()
    done = launch(tmp_path / "results", "--fail", timeout=120)
    assert done.returncode != 0
    assert "rank 1 can't go on" in done.stderr
    assert time.monotonic() - start < 100
