"""Settings for all tests."""

from __future__ import annotations

import os

# pytest-xdist runs one worker per core; torch's own threads would fight over them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
