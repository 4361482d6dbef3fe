"""Attention that is computed once: a checkpointed layer's recomputation takes its results from the host."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import cache
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_mst.ops.context import RNGState
from lightning_mst.ops.region import Region

# Fused kernels are single operators: torch's own (aten::_scaled_dot_product_flash_attention and others), flex
# attention, those of the flash-attn packages. They return the output and the log-sum-exp of the scores, of which their
# backward pass makes the rest. The unfused forms are many small operators that hold the scores of all pairs.
_NAME = re.compile(r"attention|attn")
_NOT = re.compile(r"backward|bwd|math")


@cache
def is_fused_attention(operator: Any) -> bool:
    """Whether an operator is the forward pass of a fused attention kernel."""
    name = operator.name()
    return bool(_NAME.search(name)) and not _NOT.search(name)


def writes_arguments(operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an operator does more than to give a result: it fills a tensor that it is given."""
    schema = getattr(operator, "_schema", None)  # operators of higher order have none
    for index, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            if given is not None:
                return True
    return False


class _Attentions(TorchDispatchMode):
    """Sees every operator of a layer."""

    supports_higher_order_operators = True  # flex attention is one

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled parts are operators to it, as for torch's selective checkpointing."""
        return True

    def __init__(self, region: Region) -> None:
        super().__init__()
        self._region = region

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_fused_attention(func) or writes_arguments(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        return self._attention(func, args, kwargs or {})

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError


class _KeepAttention(_Attentions):
    """Runs attention and keeps its results."""

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Any:
        query = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        random = RNGState(query.device)
        result = func(*args, **kwargs)
        leaves, structure = tree_flatten(result)
        # What the layer draws after attention's dropout must be drawn again from there. Fake tensors draw nothing.
        drawn = None if isinstance(query, FakeTensor) or random.is_current() else RNGState(query.device)
        self._region.keep([func, structure, drawn, *leaves])
        self._region.has_attention = True
        return result


class _AnswerAttention(_Attentions):
    """Answers with the results that were kept."""

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Any:
        was, structure, drawn, *leaves = self._region.kept()
        if was is not func:
            raise RuntimeError(
                f"A checkpointed layer ran {was} in the forward pass, but its recomputation {func}: its attention is "
                "not the same twice. Set checkpoint_offload='inputs'."
            )
        if drawn is not None:
            drawn.restore()
        return tree_unflatten(leaves, structure)


class _Context:
    """Runs a layer, or its recomputation, under a mode; again and again where the graph is kept."""

    def __init__(self, region: Region, mode: type[_Attentions], *, recomputing: bool) -> None:
        self._region, self._mode, self._recomputing = region, mode, recomputing
        self._stack = ExitStack()

    def __enter__(self) -> None:
        self._stack.enter_context(self._region.entered(recomputing=self._recomputing))
        self._stack.enter_context(self._mode(self._region))

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)


def keeping_attention(region: Region) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The ``context_fn`` of ``torch.utils.checkpoint`` for a layer whose attention is not recomputed.

    Args:
        region: the call of the layer.

    Returns:
        The contexts of the forward pass and of its recomputation, which may be entered several times.
    """
    return _Context(region, _KeepAttention, recomputing=False), _Context(region, _AnswerAttention, recomputing=True)
