"""torchao's engine, and what stands in for a GPU's streams where steps are rehearsed on fake tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim import Optimizer

DEVICES = ("cuda", "xpu")
"""Whose gradients the engine can take."""

_stand_in = False


def offloading() -> Any:
    """torchao's module with the engine.

    Raises:
        ModuleNotFoundError: torchao is not installed.
    """
    try:
        from torchao.optim import cpu_offload
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "OptimizerOnHost needs the package torchao: pip install 'lightning-mst[quantized]'", name=error.name
        ) from error
    return cpu_offload


def device_type() -> str | None:
    """The type of the device that an engine made now would work for; ``None`` if none that it could is there."""
    if _stand_in:
        return "cpu"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None and accelerator.type in DEVICES else None


class Engine:
    """torchao's engine without its hooks, which nobody could take off the parameters again.

    Args:
        groups: parameter groups with all options.
        make: makes the optimizer of one parameter.
        offload_gradients: free gradients as soon as they are copied.
        minimal_size: numbers of the smallest parameter that goes to the host.

    Attributes:
        copies: by parameter, its copy on the host, whose ``grad`` is the buffer of its gradient.
        waiting: the parameters whose gradients were copied, or are about to be, for the next step.

    Raises:
        RuntimeError: the memory on the host is not to be had; the parameters are as they were.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        make: Callable[..., Optimizer],
        *,
        offload_gradients: bool,
        minimal_size: int,
    ) -> None:
        self._surroundings = _one_after_the_other if _stand_in else nullcontext
        groups = [dict(group) for group in groups]
        hooks = {parameter: len(_hooks_of(parameter)) for group in groups for parameter in group["params"]}
        try:
            with self._surroundings():
                self._engine = offloading().CPUOffloadOptimizer(
                    groups, make, offload_gradients=offload_gradients, minimal_size=minimal_size
                )
        finally:
            for parameter, number in hooks.items():
                if len(_hooks_of(parameter)) > number:  # the newest is the engine's, one function for all
                    _, self._begin_copy = _hooks_of(parameter).popitem()
        self.copies: dict[Tensor, Tensor] = self._engine.param_d2h_map
        self.waiting: dict[Tensor, Any] = self._engine.queue

    @property
    def optimizers(self) -> list[Optimizer]:
        """One for each parameter on the host, and one for those that stay on the device, if there are any."""
        on_device = [] if self._engine.d_opt is None else [self._engine.d_opt]
        return [*self._engine.optim_dict.values(), *on_device]

    def begin_copy(self, parameter: Tensor) -> None:
        """Begins to copy a parameter's gradient into its buffer; frees it after that if gradients are offloaded."""
        with self._surroundings():
            self._begin_copy(parameter)

    def wait(self) -> None:
        """Waits until all gradients are in their buffers."""
        if self.waiting:
            self._engine.stream.synchronize()

    def step(self) -> None:
        """Steps the parameters that are waiting and those on the device, and puts the new values into the model."""
        with self._surroundings():
            self._engine.step()


def _hooks_of(parameter: Tensor) -> OrderedDict[int, Callable[[Tensor], None]]:
    """Those that run when a gradient is complete."""
    # Not public, but the engine drops the handles that would remove its own.
    return parameter._post_accumulate_grad_hooks or OrderedDict()


@contextmanager
def without_accelerator() -> Iterator[None]:
    """Lets engines that are made in the body work for the CPU: copies are plain ones, and no memory is pinned.

    The engine is torchao's all the same, so that a rehearsal sees what it allocates, and when it frees it.
    """
    global _stand_in
    before, _stand_in = _stand_in, True
    try:
        yield
    finally:
        _stand_in = before


@contextmanager
def _one_after_the_other() -> Iterator[None]:
    module = offloading()
    with (
        patch.object(module, "torch", _Torch()),
        patch.object(module, "get_available_devices", lambda: ["cuda"]),
        patch.object(Tensor, "record_stream", lambda tensor, stream: None),
    ):
        yield


class _Stream:
    """A stream, and its events, of a device that does one thing after the other."""

    def wait_stream(self, stream: _Stream) -> None:
        pass

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        pass


class _Cuda:
    Stream = current_stream = _Stream

    def stream(self, stream: _Stream) -> AbstractContextManager[None]:
        return nullcontext()


class _Torch:
    """What torchao's module calls ``torch``."""

    cuda = _Cuda()

    def empty_like(self, tensor: Tensor, *, pin_memory: bool = False, **options: Any) -> Tensor:
        return torch.empty_like(tensor, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
