"""Measuring memory."""

from lightning_mst.memory.peak import PeakMemory

__all__ = ["PeakMemory"]
