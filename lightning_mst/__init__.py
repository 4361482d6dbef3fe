"""Mini-Sequence Transformer for PyTorch Lightning (arXiv 2407.15892)."""

from lightning_mst.rewrite import MSTConfig, MSTHandle, apply_mst

__version__ = "0.1.0"
__all__ = ["MSTConfig", "MSTHandle", "__version__", "apply_mst"]
