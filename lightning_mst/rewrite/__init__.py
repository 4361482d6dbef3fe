"""Rewriting a model in place: finding its MLPs, LM head and layers, and changing what they do, not what they are."""

from lightning_mst.rewrite.config import MSTConfig
from lightning_mst.rewrite.handle import MSTHandle, Row, apply_mst

__all__ = ["MSTConfig", "MSTHandle", "Row", "apply_mst"]
