"""Every strategy on two processes against the unmodified model in one, with all ranks' sequences in its batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import environment
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from cases import CASES, RANKS, STEPS, VOCAB, Case, build  # noqa: E402


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks wrote down of all cases."""
    file = tmp_path_factory.mktemp("cases") / "results"
    command = [sys.executable, str(HERE / "run_cases.py"), str(file), *CASES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=HERE, env=environment())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [torch.load(f"{file}.{rank}") for rank in range(RANKS)]


def expected(case: Case, dtype: torch.dtype) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Each step's loss and gradients of the unmodified model, by plain PyTorch, one big batch to a step."""
    model = build(case.tied).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    rows = case.data()
    count = 2 * case.replicas * case.batches
    losses, gradients = [], []
    for step in range(STEPS):
        batch = rows[step * count : (step + 1) * count]
        ids, labels = (torch.stack([row[key] for row in batch]) for key in ("input_ids", "labels"))
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        gradients.append({f"model.{name}": p.grad.clone() for name, p in model.named_parameters()})
        losses.append(loss.item())
        optimizer.step()
    return losses, gradients


def distance(got: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> float:
    """Of the whole gradients of all steps, relative."""
    assert [step.keys() for step in got] == [step.keys() for step in wanted]
    pairs = [(g[name].double(), w[name].double()) for g, w in zip(got, wanted, strict=True) for name in w]
    return max(((g - w).norm() / w.norm()).item() for g, w in pairs)


def overall(got: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> float:
    """As ``distance``, over all parameters together."""
    parts = [
        (g[name].double() - w[name].double(), w[name].double()) for g, w in zip(got, wanted, strict=True) for name in w
    ]
    return (sum(d.norm() ** 2 for d, _ in parts) ** 0.5 / sum(w.norm() ** 2 for _, w in parts) ** 0.5).item()


@pytest.mark.parametrize("name", [name for name in CASES if "bf16" not in name])
def test_gradients_are_those_of_one_process_with_the_global_batch(results: list[dict[str, Any]], name: str) -> None:
    case = CASES[name]
    double = case.trainer.get("precision") == "64-true"
    losses, wanted = expected(case, torch.float64)
    for rank in range(RANKS):
        result = results[rank][name]
        assert "error" not in result, result["error"]
        # transformers computes the loss and the norms in fp32, in a double-precision model as well.
        assert distance(result["gradients"], wanted) < (1e-6 if double else 1e-5)
    if not case.ragged:  # of ragged ones, the mean of means is another number
        seen = torch.tensor([results[rank][name]["losses"] for rank in range(RANKS)])
        means = seen.view(RANKS, STEPS, case.batches).mean(dim=(0, 2))
        assert means.tolist() == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if "bf16" in name and "unmodified" not in name])
def test_half_precision_is_as_close_to_the_truth_as_the_unmodified_model(
    results: list[dict[str, Any]], name: str
) -> None:
    case = CASES[name]
    _, wanted = expected(case, torch.float64)
    for rank in range(RANKS):
        result, unmodified = results[rank][name], results[rank][f"{name}, unmodified"]
        assert "error" not in result, result["error"]
        assert "error" not in unmodified, unmodified["error"]
        assert overall(result["gradients"], wanted) <= 1.1 * overall(unmodified["gradients"], wanted)
