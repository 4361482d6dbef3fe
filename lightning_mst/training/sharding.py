"""Which parts of a model FSDP shards as units, and what must stay together."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lightning_mst.rewrite.discovery import find_layers
from lightning_mst.rewrite.heads import find_lm_heads

__all__ = ["check_all_sharded", "check_still_tied", "check_tied_weights", "layer_policy", "shard_models", "wrapped_by"]

_COMPUTE_DTYPE = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def layer_policy(layers: Iterable[nn.Module]) -> Callable[..., bool]:
    """An FSDP1 ``auto_wrap_policy`` that wraps just these modules.

    Args:
        layers: the modules.
    """
    chosen = set(layers)

    def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        return recurse or module in chosen

    return policy


def wrapped_by(policy: Any, model: nn.Module) -> set[nn.Module]:
    """The modules that an FSDP1 ``auto_wrap_policy`` makes units of their own.

    Args:
        policy: a policy object of ``torch.distributed.fsdp.wrap``, or a function of ``module``, ``recurse`` and
            ``nonwrapped_numel``.
        model: the model to be wrapped.
    """
    if hasattr(policy, "_run_policy"):  # torch's policy objects offer no other way to ask them
        return set(policy._run_policy(model, set(), {}))
    return {
        module
        for module in model.modules()
        if policy(module=module, recurse=False, nonwrapped_numel=sum(p.numel() for p in module.parameters()))
    }


def check_tied_weights(model: nn.Module, units: set[nn.Module]) -> None:
    """Makes sure that modules that share a weight are sharded as parts of the same unit.

    Args:
        model: the model, not yet sharded.
        units: the modules that become units; what is in none of them belongs to the model's own.

    Raises:
        MisconfigurationException: a weight would be split between two units.
    """
    unit_of: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        parent, _, _ = name.rpartition(".")
        unit_of[module] = name if module in units else unit_of.get(model.get_submodule(parent), "") if name else ""
    owners: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            first = owners.setdefault(parameter, f"{name}.{key}")
            other = unit_of[model.get_submodule(first.rpartition(".")[0])]
            if other != unit_of[module]:
                raise MisconfigurationException(
                    f"{first} and {name}.{key} are one tied weight, but the FSDP policy shards them in different units"
                    f" ({other or 'the root'} and {unit_of[module] or 'the root'}). Leave both modules out of the"
                    " policy: they then belong to the root's unit."
                )


def shard_models(pl_module: nn.Module, mesh: DeviceMesh, precision: str) -> None:
    """Shards every language model in a LightningModule by FSDP2: each layer, embedding and head a unit, then the rest.

    A model that is sharded already stays as it is. An embedding and a head that share their weight belong to the
    model's own unit.

    Args:
        pl_module: holds transformers models, or else other modules that it calls.
        mesh: one-dimensional, over the data-parallel ranks.
        precision: the Trainer's; under ``"bf16-mixed"`` weights are gathered in bf16 and gradients reduced in fp32.
    """
    options: dict[str, Any] = {"mesh": mesh}
    if precision in _COMPUTE_DTYPE:
        options["mp_policy"] = MixedPrecisionPolicy(_COMPUTE_DTYPE[precision], reduce_dtype=torch.float32)
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
            fully_shard(module, **options, reshard_after_forward=module not in heads)
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


def check_all_sharded(pl_module: nn.Module) -> None:
    """Makes sure that FSDP2 takes care of every gradient.

    Args:
        pl_module: the LightningModule after ``configure_model``.

    Raises:
        MisconfigurationException: a weight that is trained is not sharded, so that each rank would train it by itself.
    """
    left = [name for name, p in pl_module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if left:
        raise MisconfigurationException(
            f"{len(left)} trained weights, such as {left[0]}, are not sharded, so that every rank would train its own."
            " Shard them in configure_model with torch.distributed.fsdp.fully_shard, called on the module that holds"
            " them."
        )


def check_still_tied(model: nn.Module) -> None:
    """Makes sure that FSDP2 did not make two weights of a tied one.

    Args:
        model: sharded, or not.

    Raises:
        MisconfigurationException: a transformers model ties its head to its embedding, and they are two weights.
    """
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if not getattr(config, "tie_word_embeddings", False) or not hasattr(module, "get_output_embeddings"):
            continue
        embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
        if head is not None and isinstance(head.weight, DTensor) and head.weight is not embedding.weight:
            raise MisconfigurationException(
                f"{name or type(module).__name__} ties its LM head to its embedding, but fully_shard made two weights"
                " of theirs, because one of them was sharded as a unit of its own. Call fully_shard on the model"
                " alone for the two."
            )
