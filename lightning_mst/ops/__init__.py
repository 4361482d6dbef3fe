"""Pure functions on tensors: the two ops, deferred logits, and the choice of chunk sizes. Needs torch only."""

from lightning_mst.ops.heads import LinearHead, ModuleHead
from lightning_mst.ops.linear_cross_entropy import head_cross_entropy, linear_cross_entropy
from lightning_mst.ops.token_wise import token_wise

__all__ = ["LinearHead", "ModuleHead", "head_cross_entropy", "linear_cross_entropy", "token_wise"]
