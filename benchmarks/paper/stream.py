"""Every allocation of a training's first two steps, for models of any depth and sequences of any length."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.paper.allocator import Block, CachingAllocator, OutOfMemory
from lightning_mst import OptimizerInBackward
from lightning_mst.memory.attention import FlashAttention
from lightning_mst.memory.known_values import KnownValues
from lightning_mst.memory.longest import longest
from lightning_mst.memory.places import Places, blocks_of
from lightning_mst.memory.setting import Setting
from lightning_mst.rewrite.discovery import find_layers

RECORDED_LAYERS = 5
"""The first two, the last two, and one that stands for all between them: it has equals on both sides."""
_MIDDLE = 2


class Segment(NamedTuple):
    """A stretch of the program.

    Attributes:
        part: ``"weights"``, ``"weights behind"`` the layers, or the pass and the step: ``"forward 0"``,
            ``"backward 0"``, ...
        layer: the index of the layer, or ``None`` before the first layer of a pass.
    """

    part: str
    layer: int | None


class Event(NamedTuple):
    """A tensor is made, or freed.

    Attributes:
        segment: when.
        maker: the segment in which it was made.
        number: which of the tensors that were made there.
        size: bytes of a tensor that is made; ``None`` for one that is freed.
    """

    segment: Segment
    maker: Segment
    number: int
    size: int | None


class Recorder(TorchDispatchMode):
    """Takes note of all tensors that operators make, and of when they are freed.

    Attributes:
        events: what happened.
    """

    def __init__(self, places: Places, layers: list[str]) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._places = places
        self._layers = {name: index for index, name in enumerate(layers)}
        self._segment = Segment("weights", None)
        self._alive: dict[int, tuple[Segment, int]] = {}
        self._made: dict[Segment, int] = {}
        self._is_on = True

    def begin(self, part: str, layer: int | None = None) -> None:
        """Names what comes next."""
        self._segment = Segment(part, layer)

    def end(self) -> None:
        """What becomes of the tensors from now on is no event any more."""
        self._is_on = False

    def add(self, tensor: Tensor) -> None:
        """Takes note of a tensor, if it is new."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._alive:
            return
        segment = self._now()
        number = self._made.get(segment, 0)
        self._made[segment] = number + 1
        self._alive[storage._cdata] = segment, number
        self.events.append(Event(segment, segment, number, storage.nbytes()))
        weakref.finalize(storage, self._free, storage._cdata).atexit = False

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs the operator."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result

    def _free(self, key: int) -> None:
        maker, number = self._alive.pop(key)
        if self._is_on:
            self.events.append(Event(self._now(), maker, number, None))

    def _now(self) -> Segment:
        """Layers follow one another, whatever a pass still frees of the one before."""
        part, layer = self._segment
        now = self._layers.get(self._places.now.layer)
        if now is not None and not part.startswith("weights"):
            follows = layer is None or (now > layer if part.startswith("forward") else now < layer)
            if follows:
                self._segment = Segment(part, now)
        return self._segment


def record(setting: Setting, sequence_length: int, steps: int = 2) -> list[Event]:
    """Runs training steps on fake tensors, from the first on: that one makes the optimizer's states.

    Args:
        setting: a model of ``RECORDED_LAYERS`` layers and its training.
        sequence_length: S of a batch of one sequence.
        steps: how many.

    Raises:
        ValueError: the training has no optimizer.
    """
    model, step = setting.model, setting.step(sequence_length)
    layers = [name for name, _ in find_layers(model)]
    places = Places(blocks_of(model))
    recorder = Recorder(places, layers)
    with ExitStack() as stack:
        stack.enter_context(setting.fake)
        values = stack.enter_context(KnownValues(setting.fake))
        stack.enter_context(FlashAttention(kernel_workspace=step.on_gpu).used_by(model))
        stack.enter_context(places.followed())
        stack.enter_context(recorder)
        for name, parameter in model.named_parameters():
            layer = next((i for i, prefix in enumerate(layers) if name.startswith(f"{prefix}.")), None)
            part = "weights behind" if layer is None and recorder.events[1:] else "weights"
            recorder.begin(part, layer)
            recorder.add(parameter.detach())
        optimizer = step.make_optimizer(model)
        if optimizer is None:
            raise ValueError("Steps without an optimizer don't show where its states come to lie.")
        if isinstance(optimizer, OptimizerInBackward):
            stack.callback(optimizer.remove)
        for index in range(steps):
            places.phase = "forward"
            recorder.begin(f"forward {index}")
            batch = {name: values.give(tokens) for name, tokens in step.batch.items()}
            loss = step.compute_loss(model, batch)
            places.phase = "backward"
            recorder.begin(f"backward {index}")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del loss, batch
        recorder.end()
    return recorder.events


Key = tuple[str, int | None, int]
"""A tensor of the whole model: the part and the layer in which it was made, and which one there."""


def stretched(events: Iterable[Event], depth: int) -> Iterator[tuple[Key, int | None]]:
    """What happens in a model of more layers: the middle one's stretches, as often as there are such layers.

    Args:
        events: of ``RECORDED_LAYERS`` layers.
        depth: the number of layers, at least ``RECORDED_LAYERS``.

    Yields:
        A tensor and its bytes, or ``None`` where it is freed.
    """
    stretches: dict[Segment, list[Event]] = {}
    for event in events:
        stretches.setdefault(event.segment, []).append(event)
    more = depth - RECORDED_LAYERS
    for segment, inside in stretches.items():
        if segment.layer != _MIDDLE:
            shift = more if segment.layer is not None and segment.layer > _MIDDLE else 0
            yield from _shifted(inside, shift, more)
        else:
            shifts = range(more + 1)
            for shift in reversed(shifts) if segment.part.startswith("backward") else shifts:
                yield from _shifted(inside, shift, more)


def _shifted(events: list[Event], shift: int, more: int) -> Iterator[tuple[Key, int | None]]:
    """The events of a layer that is so many layers further up, in a model of so many layers more."""
    for event in events:
        here, maker = event.segment.layer, event.maker.layer
        if maker is None:
            position = None
        elif here is not None and abs(maker - here) <= 1:
            position = maker + shift  # its own or its neighbour's
        elif maker != _MIDDLE:
            position = maker + more if maker > _MIDDLE else maker
        else:
            raise ValueError(f"{event} is about a layer in the middle that is not next to it.")
        yield (event.maker.part, position, event.number), event.size


class Replay:
    """A training of any length, replayed in torch's allocator.

    Args:
        setting: the model with ``RECORDED_LAYERS`` layers, and its training.
        depth: how many layers it has really.
        shorter: a length to record.
        longer: another one. Sizes at all others follow, as they are linear in the length.

    Raises:
        ValueError: the two lengths don't make the same tensors in the same order.
    """

    def __init__(self, setting: Setting, depth: int, shorter: int, longer: int) -> None:
        self._lengths = shorter, longer
        streams = record(setting, shorter), record(setting, longer)
        if [event[:3] for event in streams[0]] != [event[:3] for event in streams[1]]:
            raise ValueError(f"{shorter} and {longer} tokens don't make the same tensors in the same order.")
        numbers: dict[Key, int] = {}
        self._events: list[tuple[int, int, int] | int] = []
        for (key, small), (_, large) in zip(*(stretched(events, depth) for events in streams), strict=True):
            number = numbers.setdefault(key, len(numbers))
            self._events.append(number if small is None or large is None else (number, small, large))

    def events(self, length: int) -> Iterator[tuple[int, int]]:
        """What happens at a length: the number of a tensor and its bytes, or -1 where it is freed."""
        shorter, longer = self._lengths
        share = (length - shorter) / (longer - shorter)
        for event in self._events:
            if isinstance(event, int):
                yield event, -1
            else:
                number, small, large = event
                yield number, round(small + share * (large - small))

    def most_alive(self, length: int) -> int:
        """The most bytes of tensors at once."""
        sizes: dict[int, int] = {}
        alive = most = 0
        for number, size in self.events(length):
            if size < 0:
                alive -= sizes.pop(number)
            else:
                sizes[number] = size
                alive += size
                most = max(most, alive)
        return most

    def fits(self, length: int, capacity: int) -> bool:
        """Whether torch's allocator finds room for all of it in so many bytes."""
        allocator = CachingAllocator(capacity)
        blocks: dict[int, Block] = {}
        try:
            for number, size in self.events(length):
                if size < 0:
                    allocator.free(blocks.pop(number))
                else:
                    blocks[number] = allocator.allocate(size)
        except OutOfMemory:
            return False
        return True

    def longest_without_fragments(self, capacity: int) -> int:
        """The longest sequence whose tensors have room in so many bytes, wherever these are."""
        return longest(self.most_alive, capacity)

    def longest(self, capacity: int) -> int:
        """A length that fits, where one that is 0.4 % longer does not; fragments don't grow evenly with the length."""
        low, high = 1, self.longest_without_fragments(capacity) + 1
        middle = int(0.9 * high)
        while high > 1.004 * low:
            low, high = (middle, high) if self.fits(middle, capacity) else (low, middle)
            middle = (low + high) // 2
        return low
