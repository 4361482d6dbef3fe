"""How much memory the host has left, and how many processes share it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist

_MEMINFO = Path("/proc/meminfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
_AVAILABLE_LINE = re.compile(r"^MemAvailable:\s*(\d+) kB$", re.MULTILINE)


def free_host_memory() -> int:
    """Bytes that can still be taken: of the machine, or of the container whose limit is lower.

    What the page cache holds counts as free, as the kernel gives it up.
    """
    return min([_of_machine(), *_of_groups(_OWN_GROUPS, _GROUPS)])


def processes_here() -> int:
    """How many processes of a distributed run share this machine's memory."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun's
        return int(os.environ["LOCAL_WORLD_SIZE"])
    devices = torch.accelerator.device_count()
    return min(dist.get_world_size(), devices) if devices else dist.get_world_size()


def _of_machine() -> int:
    if _MEMINFO.exists() and (line := _AVAILABLE_LINE.search(_MEMINFO.read_text())):
        return int(line[1]) * 1024  # the kernel gives kB and means KiB
    if not hasattr(os, "sysconf"):
        return sys.maxsize  # Windows says nothing by Python's own library, so nothing is refused there
    # Elsewhere all that the machine has; what others use of it is not known.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _of_groups(own: Path, root: Path) -> list[int]:
    """What the limits of the control groups of this process leave, both versions: ``docs.kernel.org/admin-guide``."""
    if not own.exists():
        return []
    left = []
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            base, names = (
                (root, ("memory.max", "memory.current", "inactive_file"))
                if not controllers
                else (root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
            )
            left += _of_group(base, path.strip("/"), *names)
    return left


def _of_group(base: Path, path: str, limit: str, usage: str, cache: str) -> list[int]:
    """Of a group and all groups around it; inside a container the path may lead out of what is mounted there."""
    left = []
    here = base / path
    for folder in (here, *here.parents):
        if (folder / limit).exists() and (folder / usage).exists():
            allowed = (folder / limit).read_text().strip()
            if allowed != "max":
                left.append(int(allowed) - int((folder / usage).read_text()) + _field(folder / "memory.stat", cache))
        if folder == base:
            break
    return left


def _field(file: Path, name: str) -> int:
    """A number of ``memory.stat``."""
    found = re.search(rf"^{name} (\d+)$", file.read_text(), re.MULTILINE) if file.exists() else None
    return int(found[1]) if found else 0
