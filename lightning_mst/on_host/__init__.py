"""Optimizers that keep their states, and step, in the host's memory."""

from lightning_mst.on_host.deepspeed import deepspeed_cpu_adam
from lightning_mst.on_host.optimizer import OptimizerOnHost

__all__ = ["OptimizerOnHost", "deepspeed_cpu_adam"]
