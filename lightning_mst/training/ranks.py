"""What the ranks of a run have to agree on."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_mst.rewrite.config import MSTConfig

__all__ = ["agree_on_longest", "any_rank", "check_same_settings", "mean_of_ranks", "num_replicas"]


def num_ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_of_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, by one all-reduce."""
    total = value.clone()
    if num_ranks() > 1:
        dist.all_reduce(total)
    return total / num_ranks()


def _max_of_ranks(value: float, device: torch.device) -> float:
    if num_ranks() == 1:
        return value
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def check_same_settings(config: MSTConfig) -> None:
    """Makes sure that all ranks were given the same settings.

    Args:
        config: this rank's.

    Raises:
        MisconfigurationException: on every rank, if one differs.
    """
    if num_ranks() == 1:
        return
    configs: list[Any] = [None] * num_ranks()
    dist.all_gather_object(configs, config)
    for rank, other in enumerate(configs):
        if other != configs[0]:
            raise MisconfigurationException(
                f"The ranks of a run need the same settings: rank 0 has {configs[0]}, rank {rank} has {other}."
                " Take them from something that all ranks share, such as the configuration."
            )


def num_replicas(trainer: Trainer) -> int:
    """How many different batches the ranks see at the same time: one, if all of them split the same matrices."""
    return (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)


def agree_on_longest(strategy: Strategy, batch: Any) -> tuple[int, int]:
    """The most tokens in any rank's batch, and those in this one's; one all-reduce of a number.

    Args:
        strategy: the Trainer's.
        batch: tensors in any collection. The tokens are the most positions, (B, S, ...) -> B * S, of any of them.

    Returns:
        Both at least 1.
    """
    sizes = [1]
    apply_to_collection(batch, Tensor, lambda tensor: sizes.append(tensor.shape[:2].numel()))
    own = max(sizes)
    return int(_max_of_ranks(own, strategy.root_device)), own


def any_rank(strategy: Strategy, happened: bool) -> bool:
    """Whether something happened on any rank; one all-reduce of a number."""
    return bool(_max_of_ranks(happened, strategy.root_device))
