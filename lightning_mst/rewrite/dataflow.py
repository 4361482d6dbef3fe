"""What a layer does with its MLP's output, and which of its linear layers belong together: seen in a trial run.

The trial runs a copy of one layer on the meta device, where nothing is computed, with its attention replaced by
something that returns a tensor of the same shape.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_mst.ops.metadata import needs_no_values
from lightning_mst.rewrite.pair import is_pair, rewrite_pair
from lightning_mst.rewrite.shadow import original_method
from lightning_mst.rewrite.stand_in import stand_in

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
"""Modules that mix tokens by name; what is not called so is tried."""

_TOKENS = 5


def follower_of(layer: nn.Module, mlp: str, outputs: int, width: int) -> str | None:
    """The child of a layer that gets the output of its MLP and is the only one to use it: a norm, or dropout.

    Args:
        layer: the layer.
        mlp: the MLP's name in it.
        outputs: how many values the MLP returns; 0 for one tensor and no tuple.
        width: D.

    Returns:
        Its name, or ``None`` if there is none, or the trial can't tell.
    """
    names = [name for name, child in layer.named_children() if _may_follow(child, width)]
    if not names or outputs > 1:
        return None

    def trial(twin: nn.Module) -> str | None:
        watch = _Watch()

        def run_mlp(*_: Any, **__: Any) -> Any:
            watch.value = torch.empty(1, _TOKENS, width, device="meta")
            return (watch.value,) if outputs else watch.value

        twin.get_submodule(mlp).__dict__["forward"] = run_mlp
        for name in names:
            watch.listen(name, twin.get_submodule(name))
        with watch:
            run_layer(twin, width)
        return watch.only_user

    return _first_answer(layer, trial)


def find_pair(layer: nn.Module, candidates: Iterable[tuple[str, str, int]]) -> tuple[str, str] | None:
    """Two linear layers of which the second gets the first one's output, with only pointwise work in between.

    Args:
        layer: the layer.
        candidates: (name of the first, name of the second, D), to be tried in order.
    """
    for first, second, width in candidates:

        def trial(twin: nn.Module, first: str = first, second: str = second, width: int = width) -> bool | None:
            rewrite_pair(twin.get_submodule(first), twin.get_submodule(second), 2)
            run_layer(twin, width)
            return is_pair(twin.get_submodule(second)) or None

        if _first_answer(layer, trial):
            return first, second
    return None


def _may_follow(module: nn.Module, width: int) -> bool:
    parameters = list(module.parameters())
    if parameters:
        return all(p.shape == (width,) for p in parameters)
    return isinstance(module, nn.Dropout) or type(module).__name__.endswith("Norm")


def _first_answer(layer: nn.Module, trial: Callable[[nn.Module], Any]) -> Any:
    """The trial's answer with the first kind of attention for which the layer runs."""
    for values in (2, 1, 3):
        twin = stand_in(layer, "meta").train()
        _replace_attention(twin, values)
        try:
            with torch.no_grad():
                return trial(twin)
        except Exception:
            # A layer that can't be tried with this kind of attention may run with the next. If none fits, nothing is
            # known of it, and nothing is assumed.
            continue
    return None


def run_layer(twin: nn.Module, width: int) -> None:
    """Runs a layer on a few tokens; arguments that it can't do without are ``None``."""
    forward = original_method(twin, "forward")
    _, *others = inspect.signature(forward).parameters.values()
    missing = {p.name: None for p in others if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    forward(torch.empty(1, _TOKENS, width, device="meta"), **missing)


class _SomeAttention(nn.Module):
    def __init__(self, values: int) -> None:
        super().__init__()
        self._values = values

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        result = torch.empty_like(x)
        return result if self._values == 1 else (result, *(None,) * (self._values - 1))


def _replace_attention(module: nn.Module, values: int) -> None:
    for name, child in module.named_children():
        if ATTENTION.search(name) and "norm" not in name:
            module._modules[name] = _SomeAttention(values)
        else:
            _replace_attention(child, values)


class _Watch(TorchFunctionMode):
    """Notes who uses one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None
        self._users: list[str | None] = []
        self._inside = False

    @property
    def only_user(self) -> str | None:
        """The name of the one module that was called with the tensor, if nobody else touched it."""
        return self._users[0] if len(self._users) == 1 else None

    def listen(self, name: str, module: nn.Module) -> None:
        forward = module.forward

        def run(x: Tensor) -> Any:
            if x is not self.value:
                return forward(x)
            self._users.append(name)
            self._inside = True
            try:
                return forward(x)
            finally:
                self._inside = False

        module.__dict__["forward"] = run

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.value is not None and not self._inside and not needs_no_values(func):
            self._users.extend(None for t in tree_leaves((args, kwargs)) if t is self.value)
        return func(*args, **kwargs)
