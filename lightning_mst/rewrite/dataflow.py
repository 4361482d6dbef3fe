"""What a layer does with its MLP's output, and which of its linear layers belong together: seen in a trial run.

The trial runs a copy of one layer on the meta device, where nothing is computed, with its attention replaced by
something that returns a tensor of the same shape.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_mst.rewrite.fsdp1 import is_fsdp1_unit
from lightning_mst.rewrite.handed_on import HandedOn
from lightning_mst.rewrite.joining import has_joined, rewrite_joining, rewrite_pair
from lightning_mst.rewrite.mlp import rewrite_mlp
from lightning_mst.rewrite.norms import rewrite_norm
from lightning_mst.rewrite.shadow import original_method
from lightning_mst.rewrite.shapes import true_shape
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
    names = [name for name, child in layer.named_children() if may_be_norm(child, width)]
    if not names or outputs:
        return None

    def trial(twin: nn.Module) -> str | None:
        # What experts compute depends on values, of which there are none here.
        twin.set_submodule(mlp, _FirstArgument())
        rewrite_mlp(twin.get_submodule(mlp), 2, follower=nn.Identity())
        for name in names:
            rewrite_joining(twin.get_submodule(name), notes=True)
        run_layer(twin, width)
        return next((name for name in names if has_joined(twin.get_submodule(name))), None)

    return _first_answer(layer, trial)


def find_pair(layer: nn.Module, candidates: Iterable[tuple[str, str, int]]) -> tuple[str, str] | None:
    """Two linear layers of which the second gets the first one's output, with only pointwise work in between.

    Args:
        layer: the layer.
        candidates: (name of the first, name of the second, D), to be tried in order.
    """
    for first, second, width in candidates:

        def trial(twin: nn.Module, first: str = first, second: str = second, width: int = width) -> bool:
            rewrite_pair(twin.get_submodule(first), twin.get_submodule(second), 2)
            rewrite_joining(twin.get_submodule(second), notes=True)
            run_layer(twin, width)
            return has_joined(twin.get_submodule(second))

        if _first_answer(layer, trial):
            return first, second
    return None


@dataclass(frozen=True)
class NormFlow:
    """Where a layer's norms stand between its blocks.

    Attributes:
        receivers: by the name of a norm, the names of the children that get its output; none where something else gets
            it as well, such as a sum, or the layer after this one.
        followed: the names of the attention modules whose output a norm gets.
    """

    receivers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    followed: frozenset[str] = frozenset()


def norm_flow(layer: nn.Module, norms: Iterable[str], width: int) -> NormFlow:
    """Follows the outputs of a layer's norms and attention modules in a trial run.

    Args:
        layer: the layer.
        norms: the names of its norms.
        width: D.

    Returns:
        What was seen; nothing where the trial can't tell.
    """
    names = list(norms)
    receiver = nn.Identity()
    rewrite_joining(receiver)

    def trial(twin: nn.Module) -> NormFlow:
        made: dict[str, list[HandedOn]] = {name: [] for name in names}
        given: list[Any] = []
        for name in names:
            norm = twin.get_submodule(name)
            rewrite_norm(norm, 2, receivers=[receiver])
            # Not by a hook, under which a norm does its work at once.
            norm.__dict__["forward"] = _noting(norm.forward, given, made[name])
        for name, child in twin.named_children():
            if name not in names and any(True for _ in child.parameters()) and not ATTENTION.search(name):
                twin._modules[name] = _SomeBlock(1)
        blocks = {name: part for name, part in twin.named_modules() if isinstance(part, _SomeBlock)}
        returned = {id(t) for t in tree_leaves(run_layer(twin, width))}
        receivers = {
            name: tuple(block for block, part in blocks.items() if any(t is x for t in tensors for x in part.given))
            for name, tensors in made.items()
            if not any(t.was_computed or id(t) in returned for t in tensors)
        }
        followed = (name for name, part in blocks.items() if any(x is y for x in given for y in part.made))
        return NormFlow(receivers, frozenset(followed))

    return _first_answer(layer, trial) or NormFlow()


def _noting(forward: Callable[..., Any], given: list[Any], made: list[Any]) -> Callable[..., Any]:
    def noted(*args: Any) -> Any:
        given.extend(args)
        made.append(forward(*args))
        return made[-1]

    return noted


def may_be_norm(module: nn.Module, width: int) -> bool:
    """Whether a module looks like a norm or dropout of D wide tokens: its weights, if any, have the shape (D,)."""
    parameters = list(module.parameters())
    if parameters:
        return all(true_shape(p) == (width,) for p in parameters)
    return isinstance(module, nn.Dropout) or type(module).__name__.endswith("Norm")


def _first_answer(layer: nn.Module, trial: Callable[[nn.Module], Any]) -> Any:
    """The trial's answer with the first kind of attention for which the layer runs."""
    if any(is_fsdp1_unit(part) for part in layer.modules()):
        return None  # can't be copied
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


def run_layer(twin: nn.Module, width: int) -> Any:
    """What a layer returns for a few tokens; arguments that it can't do without are ``None``."""
    forward = original_method(twin, "forward")
    _, *others = inspect.signature(forward).parameters.values()
    missing = {p.name: None for p in others if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return forward(torch.empty(1, _TOKENS, width, device="meta"), **missing)


class _FirstArgument(nn.Module):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


class _SomeBlock(nn.Module):
    def __init__(self, values: int) -> None:
        super().__init__()
        self._values = values
        self.given: list[Tensor] = []
        self.made: list[Tensor] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        self.given.append(x)
        # Not like x, which may be a norm that has not run and is not to.
        result = torch.empty(x.shape, dtype=x.dtype, device="meta")
        self.made.append(result)
        return result if self._values == 1 else (result, *(None,) * (self._values - 1))


def _replace_attention(module: nn.Module, values: int) -> None:
    for name, child in module.named_children():
        if ATTENTION.search(name) and "norm" not in name:
            module._modules[name] = _SomeBlock(values)
        else:
            _replace_attention(child, values)
