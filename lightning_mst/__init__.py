"""Mini-Sequence Transformer for PyTorch Lightning (arXiv 2407.15892)."""

from lightning_mst.callback import MSTCallback
from lightning_mst.rewrite import MSTConfig, MSTHandle, apply_mst

__version__ = "0.1.0"
__all__ = ["MSTCallback", "MSTConfig", "MSTHandle", "__version__", "apply_mst"]
