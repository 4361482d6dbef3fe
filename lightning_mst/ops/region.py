"""One call of a checkpointed layer: what it keeps on the host for its recomputation."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lightning_mst.ops.host_memory import HostMemory
from lightning_mst.ops.moved import Moved


class _Current(threading.local):
    """Of each thread, as one may evaluate a model while another one trains."""

    region: Region | None = None


_current = _Current()


class Region:
    """What one call of a checkpointed layer keeps.

    Args:
        memory: where to.
        before: the call before this one, which the backward pass will come to next.
        fraction: of the tokens whose projections are kept, too; from 0 to 1.

    Attributes:
        fraction: as given.
        is_recomputing: whether the call is repeated for the backward pass.
        has_attention: whether results of attention are among what is kept.
        movable_bytes: of what ``fraction`` is about, for all tokens.
    """

    def __init__(self, memory: HostMemory, before: Region | None = None, fraction: float = 0.0) -> None:
        self.fraction = fraction
        self.is_recomputing = False
        self.has_attention = False
        self.movable_bytes = 0
        self._memory = memory
        # Weakly: what the backward pass is done with gives its memory back.
        self._before = None if before is None else weakref.ref(before)
        self._input: Moved | None = None
        self._kept: list[list[Any]] = []
        self._next = 0

    @property
    def host_bytes(self) -> int:
        """Bytes on the host."""
        return sum(moved.host_bytes for moved in self._moved())

    def keep_input(self, tensor: Tensor) -> None:
        """Keeps the layer's input."""
        self._input = Moved(tensor, self._memory)

    def fetch_input(self) -> Tensor:
        """The layer's input; what the next layer of the backward pass will need begins to come back as well."""
        assert self._input is not None
        tensor = self._input.fetch()
        before = self._before() if self._before is not None else None
        if before is not None:
            before.return_early()
        return tensor

    def keep(self, values: Sequence[Any]) -> None:
        """Keeps what something in the layer computed, so that the recomputation need not.

        Args:
            values: floating-point tensors go to the host; everything else stays as it is.
        """
        self._kept.append([self._keep_one(value) for value in values])

    def kept(self) -> list[Any]:
        """What ``keep`` was given in the forward pass; call by call in the same order."""
        values = self._kept[self._next]
        self._next += 1
        return [value.fetch() if isinstance(value, Moved) else value for value in values]

    def leave(self) -> None:
        """Gives up on the device what was moved."""
        for moved in self._moved():
            moved.leave()

    def return_early(self) -> None:
        """Begins to bring everything back."""
        for moved in self._moved():
            moved.return_early()

    @contextmanager
    def entered(self, *, recomputing: bool) -> Iterator[None]:
        """Runs the body as this call, or as its repetition."""
        before, _current.region = _current.region, self
        self.is_recomputing, self._next = recomputing, 0
        try:
            yield
        finally:
            _current.region, self.is_recomputing = before, False

    def _moved(self) -> Iterator[Moved]:
        if self._input is not None:
            yield self._input
        for values in self._kept:
            yield from (value for value in values if isinstance(value, Moved))

    def _keep_one(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return Moved(value, self._memory) if value.is_floating_point() and value.numel() else value.detach()


def current_region() -> Region | None:
    """The call that is running now, of a layer that keeps more than its input."""
    return _current.region
