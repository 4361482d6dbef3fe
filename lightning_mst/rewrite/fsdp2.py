"""Which parts of a model FSDP2 shards as units."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lightning_mst.rewrite.discovery import find_layers
from lightning_mst.rewrite.heads import find_lm_heads

__all__ = ["shard_models"]


def shard_models(pl_module: nn.Module, mesh: DeviceMesh, precision: str, *, reshard_after_forward: bool = True) -> None:
    """Shards every language model in a LightningModule by FSDP2: each layer, embedding and head a unit, then the rest.

    A model that is sharded already stays as it is. An embedding and a head that share their weight belong to the
    model's own unit.

    Args:
        pl_module: holds transformers models, or else other modules that it calls.
        mesh: one-dimensional, over the data-parallel ranks.
        precision: the Trainer's; under ``"bf16-mixed"`` weights are gathered in bf16 and gradients reduced in fp32.
        reshard_after_forward: free a layer's gathered weights between its forward and backward pass.
    """
    options: dict[str, Any] = {"mesh": mesh}
    if not reshard_after_forward:
        options["reshard_after_forward"] = False
    if precision == "bf16-mixed":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    for model in _models(pl_module):
        if not isinstance(model, FSDPModule):
            _shard(model, options)


def _shard(model: nn.Module, options: dict[str, Any]) -> None:
    layers = find_layers(model)
    for _, layer in layers:
        if not any(isinstance(module, FSDPModule) for module in layer.modules()):
            fully_shard(layer, **options)
    heads = [model.get_submodule(head.name) for head in find_lm_heads(model, layers) if head.name]
    inside = {module for _, layer in layers for module in layer.modules()}
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) and m not in inside]
    apart = list(dict.fromkeys([*embeddings, *heads]))
    uses = Counter(parameter for module in apart for parameter in module.parameters())
    for module in apart:
        if all(uses[parameter] == 1 for parameter in module.parameters()):
            # The loss needs the head's weight right after its forward: gathered once, it is kept for both.
            keep = {"reshard_after_forward": False} if module in heads else {}
            fully_shard(module, **{**options, **keep})
    fully_shard(model, **options)


def _models(pl_module: nn.Module) -> Iterator[nn.Module]:
    """The outermost transformers models, or else the children that have parameters."""
    transformers = sys.modules.get("transformers")
    models = [m for m in pl_module.modules() if transformers and isinstance(m, transformers.PreTrainedModel)]
    if not models:
        yield from (child for child in pl_module.children() if any(True for _ in child.parameters()))
    inside: set[nn.Module] = set()
    for model in models:
        if model not in inside:
            inside.update(model.modules())
            yield model
