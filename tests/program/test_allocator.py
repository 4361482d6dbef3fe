"""Freed memory and the resident size."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from lightning_mst.program.allocator import release_freed_memory, unmap_freed_blocks

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def leave_holes():
    # A block that stays after each one that goes, as gradients lie among activations.
    large, small = [], []
    for _ in range(40):
        large.append(torch.ones(4 * 2**20 // 4))
        small.append(torch.ones(300 * 2**10 // 4))
    return small

if CALL:
    unmap_freed_blocks()
torch.ones(20 * 2**20 // 4)  # freed: from now on glibc, left alone, keeps blocks of up to 20 MiB
release_freed_memory()
before = resident()
small = leave_holes()
print((resident() - before) / 2**20)
"""


def kept_mib(call: bool, **environment: str) -> float:
    """Memory that a process still holds after freeing 160 of 172 MiB."""
    code = PROGRAM.replace("CALL", str(call))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/proc/self/statm").exists(), reason="needs glibc on Linux"
)
def test_freed_blocks_leave_the_process_at_once():
    assert kept_mib(call=False) > 150
    assert kept_mib(call=True) < 20
    assert kept_mib(call=True, MALLOC_MMAP_THRESHOLD_=str(32 * 2**20)) > 150  # the user's own setting wins
