"""Which parts of a model FSDP shards as units, and what must stay together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from lightning_mst.rewrite.fsdp1 import keep_work_in_units
from lightning_mst.rewrite.fsdp1_head import ask_units
from lightning_mst.rewrite.fsdp2 import shard_models
from lightning_mst.rewrite.handle import MSTHandle

__all__ = [
    "check_all_sharded",
    "check_heads",
    "check_still_tied",
    "check_tied_weights",
    "layer_policy",
    "shard_fsdp1",
    "shard_models",
    "wrapped_by",
]


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
        policy: a policy object of ``torch.distributed.fsdp.wrap``, a function of ``module``, ``recurse`` and
            ``nonwrapped_numel``, or ``None`` for no units.
        model: the model to be wrapped.
    """
    if policy is None:
        return set()
    if hasattr(policy, "_run_policy"):  # torch's policy objects offer no other way to ask them
        return set(policy._run_policy(model, set(), {}))
    units: set[nn.Module] = set()
    _ask(policy, model, units)
    return units - {model}


def _ask(policy: Callable[..., bool], module: nn.Module, units: set[nn.Module]) -> int:
    """Adds the units in a module, innermost first as torch asks, and returns how many weights they hold."""
    numel = sum(p.numel() for p in module.parameters())
    if not policy(module=module, recurse=True, nonwrapped_numel=numel):
        return 0
    wrapped = sum(_ask(policy, child, units) for child in module.children())
    if not policy(module=module, recurse=False, nonwrapped_numel=numel - wrapped):
        return wrapped
    units.add(module)
    return numel


def shard_fsdp1(
    strategy: FSDPStrategy, handle: MSTHandle, setup_model: Callable[[nn.Module], nn.Module], model: nn.Module
) -> nn.Module:
    """Lets FSDP1 wrap a rewritten model, and makes sure before and after that it can train.

    Args:
        strategy: Lightning's.
        handle: of the rewritten model.
        setup_model: the strategy's method that wraps.
        model: the LightningModule; it may be wrapped in parts already, by ``configure_model``.

    Returns:
        The wrapped model.

    Raises:
        MisconfigurationException: the policy splits a tied weight, or makes a unit of a part of the LM head.
    """
    units = {unit.module for unit in FullyShardedDataParallel.fsdp_modules(model)}
    if not units:
        units = wrapped_by(strategy.kwargs.get("auto_wrap_policy"), model)
        check_tied_weights(model, units)
    check_heads(handle, units)
    wrapped = setup_model(model)
    keep_work_in_units(wrapped)
    ask_units(wrapped)
    return wrapped


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


def check_heads(handle: MSTHandle, units: set[nn.Module]) -> None:
    """Makes sure that FSDP1 has all of the LM head's weights at hand when a loss is computed.

    Args:
        handle: of the rewritten model, not yet sharded.
        units: the modules that become units.

    Raises:
        MisconfigurationException: a part of a head in mini-sequence form would be a unit.
    """
    for row in handle.rows:
        if row.block != "LM head" or not row.rewritten:
            continue
        head = handle.model.get_submodule(row.name)
        for name, part in head.named_modules(prefix=row.name):
            if part is not head and part in units:
                raise MisconfigurationException(
                    f"The FSDP policy makes a unit of {name}, a part of the LM head {row.name}, which would gather its"
                    " weights for every mini-sequence. Make a unit of the head as a whole, or leave both out of the"
                    " policy. (Or use lm_head_chunks=None.)"
                )


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
