"""Lets ``Trainer(strategy="mst_ddp")`` find our strategies once this package and Lightning are imported, in any order.

Importing Lightning takes seconds, which the ops, ``apply_mst`` and the command line's help should not wait for. So the
names are registered at once where Lightning is loaded, and otherwise as soon as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["STRATEGIES", "register_strategies"]

_REGISTRY = "lightning.pytorch.strategies"

STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mst": ("MSTSingleDeviceStrategy", {}),
    "mst_ddp": ("MSTDDPStrategy", {}),
    "mst_ddp_find_unused_parameters_true": ("MSTDDPStrategy", {"find_unused_parameters": True}),
    "mst_ddp_spawn": ("MSTDDPStrategy", {"start_method": "spawn"}),
    "mst_fsdp": ("MSTFSDPStrategy", {}),
    "mst_model_parallel": ("MSTModelParallelStrategy", {}),
    "mst_deepspeed_stage_2": ("MSTDeepSpeedStrategy", {"stage": 2}),
    "mst_deepspeed_stage_3": ("MSTDeepSpeedStrategy", {"stage": 3}),
    "mst_deepspeed_stage_3_offload": (
        "MSTDeepSpeedStrategy",
        {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    ),
}
"""The name that a Trainer takes -> the class in ``lightning_mst.strategies`` and its options."""


def register_strategies() -> None:
    """Makes the names known to Lightning's registry, now or when Lightning is imported."""
    if _REGISTRY in sys.modules:
        _register(sys.modules[_REGISTRY])
    else:
        sys.meta_path.insert(0, _AfterImport())


def _register(strategies: ModuleType) -> None:
    for name, (class_name, options) in STRATEGIES.items():
        strategies.StrategyRegistry.register(
            name, partial(_build, class_name), description=f"{class_name} of lightning_mst", override=True, **options
        )


def _build(class_name: str, **options: Any) -> Any:
    return getattr(import_module("lightning_mst.strategies"), class_name)(**options)


class _AfterImport(MetaPathFinder):
    """Registers the names when the import of Lightning's strategies is complete."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Whoever looks for the module's source or resources finds the loader that has them.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register(module)
