"""A training loader that goes on where a checkpoint was written: no sequence lost, none read twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler


class EpochSampler(DistributedSampler):
    """The order of one epoch, decided by ``seed`` and the epoch alone, and this process's share of it.

    It is a ``DistributedSampler`` for a single process, too, so that Lightning puts none of its own in its place.
    A pass without ``set_epoch`` before it, as nobody calls it outside of ``fit``, takes the next epoch.

    Args:
        dataset: What is sampled.
        seed: With the epoch, the seed of the order.
        num_replicas: Processes that share the data.
        rank: Which of them this is.

    Attributes:
        start: How many of this process's indices the next pass leaves out at the beginning; 0 again after it.
    """

    def __init__(self, dataset: Dataset, *, seed: int, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        order = super().__iter__()
        self.epoch += 1
        start, self.start = self.start, 0
        return islice(order, start, None)


class ResumableDataLoader(DataLoader):
    """A ``DataLoader`` that Lightning takes back to the middle of an epoch.

    The position within an epoch is the Trainer's own count of completed batches, not that of batches handed out:
    workers read ahead, and a checkpoint that is written after an exception belongs before the batch that failed.

    Args:
        dataset: As for ``DataLoader``.
        batches_done: Returns how many batches of the running epoch are completed.
        **options: As for ``DataLoader``. With an :class:`EpochSampler`, batches that were done are not read again.
    """

    def __init__(self, dataset: Dataset, *, batches_done: Callable[[], int], **options: Any) -> None:
        super().__init__(dataset, **options)
        self.batches_done = batches_done
        self._resumes = False

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that it begins with the first batch: Lightning calls iter() before it sets the epoch and its
        # own count, and workers would read ahead at once.
        done = self.batches_done() if self._resumes else 0
        self._resumes = False
        if isinstance(self.sampler, EpochSampler):
            self.sampler.start = done * self.batch_size
            done = 0
        yield from islice(super().__iter__(), done, None)

    def state_dict(self) -> dict[str, Any]:
        """Return what decides the order of batches, apart from the epoch: the Trainer keeps epoch and position."""
        return {
            "sequences": len(self.dataset),
            "sequences per batch": self.batch_size,
            "processes": getattr(self.sampler, "num_replicas", 1),
            "seed": getattr(self.sampler, "seed", None),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the next pass where the Trainer's count says; warn if that is another place in another order.

        Args:
            state: From :meth:`state_dict`, of a checkpoint that was written within an epoch.
        """
        self._resumes = True
        now = self.state_dict()
        changes = [f"{name}: {state.get(name)} then, {now[name]} now" for name in now if state.get(name) != now[name]]
        if changes:
            rank_zero_warn(
                "The checkpoint was written within an epoch, on other data or another number of processes"
                f" ({'; '.join(changes)}). Training goes on with the same batch number, so that the rest of this epoch"
                " repeats some sequences and leaves others out. Resume with the same settings to avoid it."
            )
