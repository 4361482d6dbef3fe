"""Mini-Sequence Transformer for PyTorch Lightning (arXiv 2407.15892)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_mst.training.registration import register_strategies

if TYPE_CHECKING:
    from lightning_mst.callback import MSTCallback
    from lightning_mst.in_backward import OptimizerInBackward
    from lightning_mst.on_host import OptimizerOnHost
    from lightning_mst.rewrite import MSTConfig, MSTHandle, apply_mst

__version__ = "0.1.0"
__all__ = [
    "MSTCallback",
    "MSTConfig",
    "MSTHandle",
    "OptimizerInBackward",
    "OptimizerOnHost",
    "__version__",
    "apply_mst",
]

_HOMES = {
    "MSTCallback": "lightning_mst.callback",
    "OptimizerInBackward": "lightning_mst.in_backward",
    "OptimizerOnHost": "lightning_mst.on_host",
    "MSTConfig": "lightning_mst.rewrite",
    "MSTHandle": "lightning_mst.rewrite",
    "apply_mst": "lightning_mst.rewrite",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: ``lightning-mst --help`` should not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


register_strategies()
