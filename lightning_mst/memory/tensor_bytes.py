"""Exact bytes of live tensors, by kind and by place, on any device."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from typing_extensions import Self

from lightning_mst.memory.places import Place, Places
from lightning_mst.ops.host_memory import is_allocating_on_host

_DEVICE = torch.ops.prim.device.default
Unit = tuple[str, str] | None
Kind = Literal["weights", "gradients", "optimizer_states", "buffers", "logits", "activations", "host"]


@dataclass(frozen=True)
class Peak:
    """The highest moment at a place.

    Attributes:
        total: live bytes.
        kinds: live bytes of each kind; ``"activations"`` are all tensors that are none of the others, ``"host"`` those
            in the host's memory, which are no part of the total.
        inside: of the activations, those that were made in the same pass through the same layer, or through the same
            block outside of the layers.
    """

    total: int
    kinds: Mapping[str, int]
    inside: int


@dataclass(frozen=True)
class Event:
    """A change of the live bytes.

    Attributes:
        live: bytes after it.
        place: where the program was, if places are followed.
    """

    live: int
    place: Place | None


class TensorBytes(TorchDispatchMode):
    """Follows the bytes of every tensor that an operator makes while the mode is on.

    Storages are counted once, however many views they have, until the last view is gone. What an operator allocates
    and frees inside its kernel is not seen.

    Args:
        existing: tensors that are there already and don't count.
        places: tells where the program is; without it there are no ``peaks``.
        vocab_size: V; tensors (..., V) that come up in the forward and backward pass count as logits.
        record: keep every change in ``events``.

    Attributes:
        live: bytes that are alive now.
        peak: the most bytes that were alive at once.
        peaks: the highest moment at each place.
        events: every change so far.
    """

    def __init__(
        self,
        existing: Iterable[Tensor] = (),
        *,
        places: Places | None = None,
        vocab_size: int | None = None,
        record: bool = False,
    ) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.peaks: dict[Place, Peak] = {}
        self.events: list[Event] = []
        self._places = places
        self._vocab_size = vocab_size
        self._record = record
        self._of_kind: dict[str, int] = defaultdict(int)
        self._of_unit: dict[Unit, int] = defaultdict(int)
        self._kind: Kind | None = None
        self._resize_storage: Callable[..., Any] | None = None
        # By the address of a storage: its bytes, its kind, and where it was made.
        self._storages: dict[int, tuple[int, Kind, Unit]] = {}
        self._finalizers: dict[int, weakref.finalize[..., Any]] = {}
        # Kept, so that the address of a storage stands for the same storage throughout.
        self._existing = {t.untyped_storage()._cdata: t.untyped_storage() for t in existing}

    def count(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Counts tensors that exist already, or says of which kind those are that are counted."""
        for tensor in tensors:
            for plain in _plain_tensors(tensor):
                storage = plain.untyped_storage()
                self._existing.pop(storage._cdata, None)
                self._forget(storage._cdata)
                self._follow(storage, kind)

    @contextmanager
    def counting(self, kind: Kind) -> Iterator[None]:
        """Counts what is made in the body as of this kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def forget_peaks(self) -> None:
        """Starts a new measurement with what is alive now."""
        self.peak = self.live
        self.peaks.clear()
        self.events.clear()

    def freeze(self) -> None:
        """Ends the measurement: what becomes of the tensors from now on is no event any more."""
        self._storages.clear()
        # Tensors that live on would keep the measurement alive, one for every step that is measured.
        for finalizer in self._finalizers.values():
            finalizer.detach()
        self._finalizers.clear()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs the operator and takes note of the storages that it made."""
        kwargs = kwargs or {}
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # asked for more often than all else together
            return args[0].fake_device
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(map(is_traceable_wrapper_subclass, tensors)):
            # A sharded tensor's own operators come next, and those are seen.
            return NotImplemented
        given = {t.untyped_storage()._cdata for t in tensors}
        del tensors
        result = func(*args, **kwargs)
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_meta and not is_traceable_wrapper_subclass(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in given:
                    self._resize(storage)
                elif storage._cdata not in self._storages and storage._cdata not in self._existing:
                    self._follow(storage, self._kind_of(tensor))
        return result

    def __enter__(self) -> Self:
        """Begins; FSDP frees and refills gathered weights by resizing their storage, which is no operator."""
        resize = self._resize_storage = torch.UntypedStorage.resize_

        def resize_and_note(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._resize(storage, "weights")
            return result

        torch.UntypedStorage.resize_ = resize_and_note
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        """Ends."""
        super().__exit__(*exception)
        torch.UntypedStorage.resize_ = self._resize_storage

    def _kind_of(self, tensor: Tensor) -> Kind:
        if is_allocating_on_host():
            return "host"
        if self._kind is not None:
            return self._kind
        if tensor.shape[-1:] == (self._vocab_size,) and self._place_phase() != "optimizer":
            return "logits"
        return "activations"

    def _place_phase(self) -> str | None:
        return self._places.phase if self._places is not None else None

    def _follow(self, storage: torch.UntypedStorage, kind: Kind) -> None:
        key, size = storage._cdata, storage.nbytes()
        place = self._places.now if self._places is not None else None
        unit = place.unit if place is not None else None
        self._storages[key] = (size, kind, unit)
        self._add(size, kind, unit)
        self._finalizers[key] = weakref.finalize(storage, self._forget, key)
        self._finalizers[key].atexit = False

    def _resize(self, storage: torch.UntypedStorage, new_kind: Kind | None = None) -> None:
        known = self._storages.get(storage._cdata)
        if known is not None and known[0] != storage.nbytes():
            size, kind, unit = known
            self._add(-size, kind, unit)
            kind = new_kind or kind
            self._storages[storage._cdata] = (storage.nbytes(), kind, unit)
            self._add(storage.nbytes(), kind, unit)

    def _forget(self, key: int) -> None:
        known = self._storages.pop(key, None)
        if known is not None:
            self._finalizers.pop(key).detach()
            size, kind, unit = known
            self._add(-size, kind, unit)

    def _add(self, size: int, kind: Kind, unit: Unit) -> None:
        self._of_kind[kind] += size
        if kind == "host":
            return
        self.live += size
        if kind == "activations":
            self._of_unit[unit] += size
        place = self._places.now if self._places is not None else None
        if self._record and size:
            self.events.append(Event(self.live, place))
        if size > 0:
            self.peak = max(self.peak, self.live)
            if place is not None:
                self._note(place)

    def _note(self, place: Place) -> None:
        before = self.peaks.get(place)
        if before is None or self.live > before.total:
            self.peaks[place] = Peak(self.live, dict(self._of_kind), self._of_unit[place.unit])


def _plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors that a sharded or quantized one is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # some name what is no tensor as well, such as a mesh of devices
    inner = (getattr(tensor, name) for name in names)
    return [plain for part in inner if isinstance(part, Tensor) for plain in _plain_tensors(part)]
