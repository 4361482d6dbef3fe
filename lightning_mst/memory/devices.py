"""What a device takes beside a program's tensors, and what its kernels take for themselves."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes:
        overhead: bytes that are gone before the first tensor: the driver's context, kernels, matmul workspaces.
        is_gpu: whether attention runs in the flash kernel with its workspace, and optimizers default to ``foreach``.
        source: where ``overhead`` comes from.
    """

    overhead: int
    is_gpu: bool
    source: str


# One entry per kind of device. What to write here is printed by `lightning-mst plan --measure` on the device:
#
#   overhead = (total - free memory of the device - what torch's allocator holds)    the driver's context and kernels
#            + (what is still allocated when the model is gone)                       the matmul workspaces
#
# No entry for GPUs has been measured yet: "cuda" is an estimate from what is known of its parts.
DEVICES = {
    "cuda": Device(
        overhead=600 * MIB,
        is_gpu=True,
        source="estimated, not measured: about 500 MiB for the CUDA context and its kernels, and cuBLAS workspaces of "
        "8 to 32 MiB for each thread that multiplies matrices (one for forward, one for backward)",
    ),
    "cpu": Device(overhead=0, is_gpu=False, source="none counted, only the bytes of tensors"),
}
"""By the type of a ``torch.device``."""
