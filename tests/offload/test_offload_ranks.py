"""Layers' inputs and attention on the host in two processes, sharded by FSDP2 layer by layer, or under DDP."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from offload_models import build, distance, gradients, loss_of, tokens
from processes import environment

HERE = Path(__file__).parent


def test_gradients_of_two_processes_are_those_of_one_with_both_batches(tmp_path):
    file = tmp_path / "gradients"
    command = [sys.executable, str(HERE / "run_offload_ranks.py"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=HERE, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    expected = gradients(build(), lambda model: loss_of(model, input_ids=tokens(2)))
    for rank in range(2):
        results = torch.load(f"{file}.{rank}")
        assert len(results) == 6
        for name, found in results.items():
            assert distance(found, expected) < 1e-10, name
