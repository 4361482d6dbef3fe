"""What a training step's peak memory was, and where in the step it occurred."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lightning_mst.memory.peak import PeakMemory, Reading
from lightning_mst.memory.places import Phase, Place, Places
from lightning_mst.memory.prediction import Prediction
from lightning_mst.units import in_words

PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class StepMemory:
    """The peak memory of one training step, in this process.

    Attributes:
        step: optimizer steps that were taken before it.
        peak: bytes.
        places: the peak in bytes at each place of the step; empty where nothing can tell them apart.
        allocated: the most bytes that an accelerator's allocator had given to tensors at once, else ``None``.
        reserved: the most bytes that it held, those in its cache included.
        kinds: live bytes of each kind of tensor at the peak, if tensors were followed.
    """

    step: int
    peak: int
    places: Mapping[Place, int] = field(default_factory=dict)
    allocated: int | None = None
    reserved: int | None = None
    kinds: Mapping[str, int] | None = None

    @property
    def place(self) -> Place | None:
        """Where the peak occurred, or ``None`` where nothing can tell."""
        return self.place_in(PHASES)

    @property
    def phases(self) -> dict[Phase, int]:
        """The peak in bytes of each phase that the step went through."""
        return {p: self.places[where] for p in PHASES if (where := self.place_in([p])) is not None}

    def place_in(self, phases: Iterable[Phase]) -> Place | None:
        """Where the peak of these phases occurred, or ``None`` if the step has none of them."""
        there = {place: peak for place, peak in self.places.items() if place.phase in phases}
        return max(there, key=lambda place: there[place], default=None)

    def __str__(self) -> str:
        """For example ``2.31 GiB, backward of model.layers.3, mlp``."""
        return in_words(self.peak) + (f", {self.place}" if self.place else "")


@dataclass
class MemoryLog:
    """The steps of a training run that matter.

    Attributes:
        last: the newest step.
        highest: the step with the highest peak.
        predicted: the predicted peak of a step whose optimizer has its states, where there is a prediction.
    """

    last: StepMemory | None = None
    highest: StepMemory | None = None
    predicted: Prediction | None = None

    def add(self, step: StepMemory) -> None:
        """Takes down a step."""
        self.last = step
        if self.highest is None or step.peak > self.highest.peak:
            self.highest = step


class PeakByPlace:
    """Measures the peak of a step, place by place: it is read and reset whenever the place changes.

    Args:
        memory: what is measured; it has to be resettable.
        places: tells where the program is.

    Attributes:
        peaks: bytes at each place.
    """

    def __init__(self, memory: PeakMemory, places: Places) -> None:
        self._memory = memory
        self._places = places
        self._reserved = 0
        self.peaks: dict[Place, int] = {}
        memory.reset()
        places.on_change = self._note

    def _note(self) -> None:
        reading, place = self._memory.read_all(), self._places.now
        if reading is not None:
            self.peaks[place] = max(self.peaks.get(place, 0), reading.peak)
            self._reserved = max(self._reserved, reading.reserved or 0)
        self._memory.reset()

    def end(self) -> Reading | None:
        """The peak of the whole step, now that it is over; ``None`` where nothing measures it."""
        self._places.on_change = lambda: None
        self._note()
        return Reading(max(self.peaks.values()), self._reserved or None) if self.peaks else None
