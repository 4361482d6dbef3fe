"""Measuring memory."""

from lightning_mst.memory.peak import PeakMemory
from lightning_mst.memory.tensor_bytes import TensorBytes

__all__ = ["PeakMemory", "TensorBytes"]
