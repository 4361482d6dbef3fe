"""Lightning's strategies with mini-sequences: ``Trainer(strategy="mst_ddp")``.

Each is Lightning's own class and what that engine needs from us; everything else is ``MSTCallback``'s work. A Trainer
without that callback gets one, and with both the model is rewritten once.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mst.callback import MSTCallback
from lightning_mst.rewrite.config import MSTConfig
from lightning_mst.rewrite.handle import MSTHandle
from lightning_mst.training.optimizers import check_deepspeed_optimizer
from lightning_mst.training.sharding import (
    check_all_sharded,
    layer_policy,
    shard_models,
)

__all__ = [
    "MSTDDPStrategy",
    "MSTDeepSpeedStrategy",
    "MSTFSDPStrategy",
    "MSTModelParallelStrategy",
    "MSTSingleDeviceStrategy",
]


_FSDP2_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")


class _WithMST(Strategy):
    """Gives a Trainer that has no ``MSTCallback`` one.

    Args:
        *args: of Lightning's strategy.
        mst: the settings; default those of the Trainer's ``MSTCallback``, or else ``MSTConfig()``.
        **kwargs: of Lightning's strategy.
    """

    def __init__(self, *args: Any, mst: MSTConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if mst is not None and not isinstance(mst, MSTConfig):
            raise TypeError(f"mst should be an MSTConfig, got {type(mst).__name__}: {mst!r}.")
        self.mst = mst

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        callbacks = model.trainer.callbacks
        if not any(isinstance(callback, MSTCallback) for callback in callbacks):
            # First, as checkpoints are to be the last.
            callbacks.insert(0, MSTCallback.of_config(self.mst or MSTConfig()))

    def _handle(self) -> MSTHandle:
        assert self.lightning_module is not None
        callbacks = self.lightning_module.trainer.callbacks
        handle = next(callback for callback in callbacks if isinstance(callback, MSTCallback)).handle
        assert handle is not None
        return handle


class MSTSingleDeviceStrategy(_WithMST, SingleDeviceStrategy):
    """One device, with mini-sequences; as ``strategy="mst"``.

    Args:
        device: the device; default: the one that the Trainer chooses.
        mst: as in ``_WithMST``.
        **kwargs: of Lightning's ``SingleDeviceStrategy``.
    """

    def __init__(
        self, device: str | torch.device | None = None, *, mst: MSTConfig | None = None, **kwargs: Any
    ) -> None:
        super().__init__(device="cpu" if device is None else device, mst=mst, **kwargs)
        self._parallel_devices = None if device is None else [torch.device(device)]

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The device in a list, as the Trainer hands it over; ``None`` until then."""
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) != 1:
            raise MisconfigurationException(
                f"strategy='mst' trains on one device, got {len(devices)}. Set Trainer(devices=1), or"
                " strategy='mst_ddp', 'mst_fsdp' or 'mst_model_parallel' for several."
            )
        self._parallel_devices = devices
        self._root_device = devices[0]


class MSTDDPStrategy(_WithMST, DDPStrategy):
    """Lightning's DDP with mini-sequences; as ``strategy="mst_ddp"``.

    Works with DDP's default flags: each parameter's gradient is delivered once per backward pass.
    """


class MSTFSDPStrategy(_WithMST, FSDPStrategy):
    """Lightning's FSDP1 with mini-sequences; as ``strategy="mst_fsdp"``.

    Without an ``auto_wrap_policy`` every decoder layer that the rewrite found becomes a unit. Gradients can be clipped
    by norm, which Lightning's own strategy leaves to the user.
    """

    def __init__(self, *args: Any, mst: MSTConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, mst=mst, **kwargs)
        self._has_own_policy = "auto_wrap_policy" in self.kwargs

    @override
    def setup_environment(self) -> None:
        # Lightning's own check looks for its own class.
        if self.root_device.type == "cpu":
            raise MisconfigurationException(
                "strategy='mst_fsdp' needs GPUs, got CPUs. Use 'mst_model_parallel' (FSDP2) or 'mst_ddp' there."
            )
        super().setup_environment()

    @override
    def setup(self, trainer: Trainer) -> None:
        if not self._has_own_policy:
            self.kwargs["auto_wrap_policy"] = layer_policy(self._handle().layers)
        super().setup(trainer)

    @override
    def setup_precision_plugin(self) -> None:
        super().setup_precision_plugin()
        # Only FSDP1 itself knows the norm of gradients that it shards, and Lightning's plugin has no way to it.
        self.precision_plugin.__dict__["clip_grad_by_norm"] = self._clip_grad_by_norm

    def _clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        if clip_val > 0:
            assert self.model is not None
            roots = FullyShardedDataParallel.fsdp_modules(self.model, root_only=True)
            if len(roots) != 1:
                raise MisconfigurationException(
                    f"Clipping by norm needs one FSDP root, which knows the norm of all gradients, got {len(roots)}."
                    " Wrap the whole model in configure_model, or leave the wrapping to the strategy."
                )
            roots[0].clip_grad_norm_(clip_val)


class MSTModelParallelStrategy(_WithMST, ModelParallelStrategy):
    """Lightning's FSDP2 and tensor parallelism with mini-sequences; as ``strategy="mst_model_parallel"``.

    A LightningModule without ``configure_model`` gets one that shards its models by FSDP2, a unit per layer, embedding
    and head, in the Trainer's precision. Tensor parallelism needs a ``configure_model`` of the user's.

    Args:
        data_parallel_size: ranks that see different batches and shard the model; ``"auto"`` for all that
            ``tensor_parallel_size`` leaves.
        tensor_parallel_size: ranks that split each matrix.
        mst: as in ``_WithMST``.
        **kwargs: of Lightning's ``ModelParallelStrategy``.

    Raises:
        ValueError: a size is no number of ranks.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        *,
        mst: MSTConfig | None = None,
        **kwargs: Any,
    ) -> None:
        for name, size in (("data_parallel_size", data_parallel_size), ("tensor_parallel_size", tensor_parallel_size)):
            if not (isinstance(size, int) and size >= 1) and (name, size) != ("data_parallel_size", "auto"):
                raise ValueError(f"{name} should be a whole number of ranks, 1 or more, got {size!r}.")
        super().__init__(data_parallel_size, tensor_parallel_size, mst=mst, **kwargs)
        self._data_parallel_size: Literal["auto"] | int
        self._tensor_parallel_size: int
        self._shards: LightningModule | None = None

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        if not is_overridden("configure_model", model):
            if self._tensor_parallel_size != 1:
                raise MisconfigurationException(
                    f"tensor_parallel_size={self._tensor_parallel_size} needs a plan of which matrices to split:"
                    " override configure_model and call parallelize_module there, or set tensor_parallel_size=1."
                )
            model.__dict__["configure_model"] = partial(self._shard, model)
            self._shards = model

    def _shard(self, model: LightningModule) -> None:
        shard_models(model, self.device_mesh["data_parallel"], model.trainer.precision)

    @override
    def setup_environment(self) -> None:
        precision = self.precision_plugin.precision
        if precision not in _FSDP2_PRECISIONS:  # Lightning itself says so only of a strategy that is no name
            raise MisconfigurationException(
                f"strategy='mst_model_parallel' does not support precision={precision!r}. Choose one of"
                f" {', '.join(_FSDP2_PRECISIONS)}."
            )
        ranks, group = self.num_nodes * self.num_processes, self._tensor_parallel_size
        if self._data_parallel_size == "auto":
            if ranks % group != 0:
                raise MisconfigurationException(
                    f"{ranks} ranks can't be divided into groups of tensor_parallel_size={group}."
                )
            self._data_parallel_size = ranks // group
        super().setup_environment()

    @override
    def setup(self, trainer: Trainer) -> None:
        if self._shards is not None:
            check_all_sharded(self._shards)
        super().setup(trainer)

    @override
    def teardown(self) -> None:
        if self._shards is not None:
            del self._shards.__dict__["configure_model"]
            self._shards = None
        super().teardown()


class MSTDeepSpeedStrategy(_WithMST, DeepSpeedStrategy):
    """Lightning's DeepSpeed with mini-sequences; as ``strategy="mst_deepspeed_stage_2"``, ``"mst_deepspeed_stage_3"``,
    or ``"mst_deepspeed_stage_3_offload"``.

    Under ZeRO-3 the weights of a rewritten block are gathered once for all its mini-sequences. With
    ``offload_optimizer``, ``configure_optimizers`` has to make one of DeepSpeed's optimizers for the CPU, such as
    ``DeepSpeedCPUAdam``.
    """

    # Not public, but the only place between the making of the optimizer and DeepSpeed's taking it.
    @override
    def _init_optimizers(self) -> tuple[Optimizer, LRSchedulerConfig | None]:
        optimizer, scheduler = super()._init_optimizers()
        check_deepspeed_optimizer(self, optimizer)
        return optimizer, scheduler
