"""Measuring memory, and predicting it without a GPU."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mst.memory.auto_layers import settle
    from lightning_mst.memory.peak import PeakMemory
    from lightning_mst.memory.planner import Plan, plan
    from lightning_mst.memory.tensor_bytes import TensorBytes

__all__ = ["PeakMemory", "Plan", "TensorBytes", "plan", "settle"]

_HOMES = {
    "PeakMemory": "lightning_mst.memory.peak",
    "Plan": "lightning_mst.memory.planner",
    "TensorBytes": "lightning_mst.memory.tensor_bytes",
    "plan": "lightning_mst.memory.planner",
    "settle": "lightning_mst.memory.auto_layers",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: ``lightning-mst plan --help`` should not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
