"""The peak memory of a stretch of a program: the allocator's on an accelerator, the process's on a CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch


class PeakMemory:
    """Measures the highest memory use since the last ``reset``.

    On an accelerator it is the peak of the bytes that torch's allocator handed out for tensors. On a CPU it is the
    peak resident size of the process, weights, interpreter and libraries included; Linux lets a process reset it.
    Elsewhere the operating system only knows the peak of the whole run.

    Args:
        device: the device that holds the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._allocator = device.type != "cpu" and hasattr(_module(device), "max_memory_allocated")

    @property
    def description(self) -> str:
        """What is measured, in words."""
        if self._allocator:
            return f"peak bytes allocated by torch on {self._device}"
        if self.resettable:
            return "peak resident memory of the process"
        return "peak resident memory of the process since its start (this system can't reset it)"

    @property
    def resettable(self) -> bool:
        """Whether ``reset`` starts a new measurement, or everything since the start of the process counts."""
        return self._allocator or _reset_resident_peak()

    def reset(self) -> None:
        """Starts a new measurement."""
        if self._allocator:
            _module(self._device).reset_peak_memory_stats(self._device)
        else:
            _reset_resident_peak()

    def read(self) -> int | None:
        """The peak in bytes since the last ``reset``, or ``None`` where nothing measures it (never 0)."""
        if self._allocator:
            return int(_module(self._device).max_memory_allocated(self._device))
        return _resident_peak()


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def _reset_resident_peak() -> bool:
    try:
        # 5 resets VmHWM: https://docs.kernel.org/filesystems/proc.html
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _resident_peak() -> int | None:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024  # the kernel gives kB and means KiB
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
