"""The peak memory of a stretch of a program: the allocator's on an accelerator, the process's on a CPU."""

from __future__ import annotations

import os
import re
import sys
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Reading(NamedTuple):
    """What was measured since the last ``reset``.

    Attributes:
        peak: bytes.
        reserved: the most bytes that the allocator of an accelerator held, those in its cache included; ``None`` on a
            CPU.
    """

    peak: int
    reserved: int | None = None


class PeakMemory:
    """Measures the highest memory use since the last ``reset``.

    On an accelerator it is the peak of the bytes that torch's allocator handed out for tensors. On a CPU it is the
    peak resident size of the process, weights, interpreter and libraries included; Linux lets a process reset it.
    Elsewhere the operating system only knows the peak of the whole run.

    Args:
        device: the device that holds the model.

    Attributes:
        of_allocator: whether it is the allocator's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.of_allocator = device.type != "cpu" and hasattr(_module(device), "max_memory_allocated")
        self._resident = _ResidentPeak()

    @property
    def description(self) -> str:
        """What is measured, in words."""
        if self.of_allocator:
            return f"peak bytes allocated by torch on {self._device}"
        if self.resettable:
            return "peak resident memory of the process"
        return "peak resident memory of the process since its start (this system can't reset it)"

    @property
    def resettable(self) -> bool:
        """Whether ``reset`` starts a new measurement, or everything since the start of the process counts."""
        return self.of_allocator or self._resident.reset()

    def reset(self) -> None:
        """Starts a new measurement."""
        if self.of_allocator:
            _module(self._device).reset_peak_memory_stats(self._device)
        else:
            self._resident.reset()

    def read(self) -> int | None:
        """The peak in bytes since the last ``reset``, or ``None`` where nothing measures it (never 0)."""
        reading = self.read_all()
        return None if reading is None else reading.peak

    def read_all(self) -> Reading | None:
        """The peak with what belongs to it; cheap enough for every block of a step."""
        if self.of_allocator:
            return _allocator_peaks(_module(self._device), self._device)
        resident = self._resident.read()
        return None if resident is None else Reading(resident)


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _allocator_peaks(module: Any, device: torch.device) -> Reading:
    if hasattr(module, "memory_stats_as_nested_dict"):
        # Both at once, and without the flat dictionary of all statistics that max_memory_allocated sorts first.
        stats = module.memory_stats_as_nested_dict(device)
        if "allocated_bytes" in stats:
            return Reading(stats["allocated_bytes"]["all"]["peak"], stats["reserved_bytes"]["all"]["peak"])
    reserved = module.max_memory_reserved(device) if hasattr(module, "max_memory_reserved") else None
    return Reading(int(module.max_memory_allocated(device)), reserved)


_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_PEAK_LINE = re.compile(rb"VmHWM:\s*(\d+)")


class _ResidentPeak:
    """The peak resident size of this process.

    Linux's files stay open: to open one takes longer than to read it.
    """

    def __init__(self) -> None:
        self._status = self._open(_STATUS, os.O_RDONLY)
        self._clear_refs = self._open(_CLEAR_REFS, os.O_WRONLY)

    def _open(self, path: Path, flags: int) -> int | None:
        try:
            file = os.open(path, flags)
        except OSError:
            return None
        weakref.finalize(self, os.close, file)
        return file

    def reset(self) -> bool:
        """Starts a new measurement, where the system allows it."""
        if self._clear_refs is None:
            return False
        try:
            # 5 resets VmHWM: https://docs.kernel.org/filesystems/proc.html
            os.pwrite(self._clear_refs, b"5", 0)
        except OSError:
            return False
        return True

    def read(self) -> int | None:
        """Bytes, or ``None`` where nothing measures it."""
        if self._status is not None:
            line = _PEAK_LINE.search(os.pread(self._status, 1 << 14, 0))
            if line is not None:
                return int(line[1]) * 1024  # the kernel gives kB and means KiB
        if sys.platform == "win32":
            return None
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
