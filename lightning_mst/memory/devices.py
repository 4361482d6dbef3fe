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


# Calibrate with `lightning-mst plan --measure` on the device.
DEVICES = {
    "cuda": Device(
        overhead=600 * MIB,
        is_gpu=True,
        source="not measured here: about 500 MiB of CUDA context and kernels, and cuBLAS workspaces of 8 to 32 MiB "
        "for each of the threads of the forward and the backward pass",
    ),
    "cpu": Device(overhead=0, is_gpu=False, source="bytes of tensors alone"),
}
"""By the type of a ``torch.device``."""
