"""``OptimizerInBackward``: each parameter is stepped as soon as its gradient is complete, and the gradient is freed."""

from lightning_mst.in_backward.optimizer import OptimizerInBackward

__all__ = ["OptimizerInBackward"]
