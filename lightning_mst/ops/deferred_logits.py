"""Deferred logits: a tensor that remembers how to compute itself, so that a loss on it runs in mini-sequences.

An LM head that answers with deferred logits of shape (B, S, V) has computed nothing yet. What a program then does to
them decides what is computed:

1. Pointwise work (``float()``, ``* scale``, ``tanh``, a mask, another model's deferred logits) and softmax are written
   down.
2. Shape work that leaves the vocabulary axis whole (``view(-1, V)``, ``[..., :-1, :]``, ``transpose(1, 2)``) is done
   on the hidden states.
3. ``torch.nn.functional.cross_entropy`` runs op 2 on the hidden states. What leaves little of the vocabulary
   (``logsumexp``, ``gather``, ``topk``, ``sum``, ``argmax``, ``kl_div``, ...) walks chunks, with op 1 for gradients.
4. Anything else gets the real logits, computed once, with a warning that names who asked.

So the loss may live anywhere (in the model, in a training step, in a trainer) and no code of it has to change.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

# Imported for the handlers that they register.
from lightning_mst.ops import deferred_functions, deferred_reductions, deferred_shapes, deferred_stack  # noqa: F401
from lightning_mst.ops.context import AutocastState, first_order_only
from lightning_mst.ops.deferred_table import answer
from lightning_mst.ops.deferred_tensor import DeferredTensor, input_first, without_values
from lightning_mst.ops.evaluation import at_once
from lightning_mst.ops.expression import Expression, Logits, Request, Run, Source
from lightning_mst.ops.heads import Head
from lightning_mst.ops.metadata import getter_name, needs_no_values

__all__ = ["DeferredLogits", "DeferredLogitsWarning", "Request", "Run", "defer_logits"]


class DeferredLogitsWarning(UserWarning):
    """Real logits were computed because something asked for them."""


@dataclass
class _Memory:
    """What a tensor shares with its views."""

    has_views: bool = False


@dataclass(frozen=True)
class _Meta:
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


class DeferredLogits(DeferredTensor):
    """Logits that are not computed until something needs them. Made by ``defer_logits``."""

    _expression: Expression  # of inputs (*lead, d)
    _class_dim: int  # where the vocabulary is among the dimensions
    _input_versions: tuple[int, ...]
    _memory: _Memory
    _real: Tensor | None  # the real logits, once computed
    _real_version: int
    _real_only: bool  # something was done to them, so only they count

    @staticmethod
    def __new__(cls, expression: Expression, class_dim: int, dtype: torch.dtype, memory: _Memory) -> DeferredLogits:
        """Makes the tensor without a graph; ``_attached`` gives it one."""
        shape = list(expression.lead)
        shape.insert(class_dim, expression.vocab_size)
        device = expression.inputs[0].device
        result = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        result._class_dim, result._memory = class_dim, memory
        result._real, result._real_version, result._real_only = None, 0, False
        result.become(expression)
        return result

    def become(self, expression: Expression) -> None:
        """Stands for another expression of the same shape and dtype from now on."""
        self._expression = expression
        self._input_versions = tuple(map(_version, expression.inputs))

    def real(self, asked_by: str | None = None) -> Tensor:
        """The real logits: computed at the first call and kept.

        Args:
            asked_by: who needs them, for the warning; no warning if ``None``.

        Returns:
            A plain tensor of this tensor's shape and dtype, with a graph if this has one and gradients are enabled.
        """
        needs_graph = torch.is_grad_enabled() and self._meta.requires_grad
        if self._real is None or (needs_graph and not self._real.requires_grad and not self._real_only):
            if asked_by is not None:
                _warn_once(asked_by, self)
            self.check_unchanged()
            self._real = at_once(self._expression).movedim(-1, self._class_dim)
            self._real_version = _version(self._real)
        return self._real

    @property
    def _meta(self) -> _Meta:
        """The tensor's own shape, dtype, ... without a detour through ``__torch_function__``."""
        with torch._C.DisableTorchFunctionSubclass():
            return _Meta(self.shape, self.dtype, self.device, self.requires_grad)

    def check_unchanged(self) -> None:
        """Raises if what the logits depend on was written to since the head was called."""
        changed = self._input_versions != tuple(map(_version, self._expression.inputs))
        sources = (leaf.source for leaf in self._expression.logits())
        if changed or any(s.weight_versions != tuple(map(_version, s.weights)) for s in sources):
            raise RuntimeError(
                "The LM head's weights or its input changed after the head was called (an optimizer step between the "
                "logits and the loss?), so its deferred logits can't be computed any more. Compute the loss first, or "
                "keep real logits: logits.real()."
            )

    def like(
        self,
        expression: Expression,
        *,
        class_dim: int | None = None,
        dtype: torch.dtype | None = None,
        memory: _Memory | None = None,
    ) -> Tensor:
        """New deferred logits, made from these: without a graph under ``no_grad``.

        Args:
            expression: what they stand for.
            class_dim: where the vocabulary is among their dimensions. Default: where it is here.
            dtype: theirs. Default: this tensor's.
            memory: this tensor's, if they are a view of it.
        """
        self.check_unchanged()
        if not torch.is_grad_enabled():
            expression = expression.detached()
        class_dim = self._class_dim if class_dim is None else class_dim
        return _attached(DeferredLogits(expression, class_dim, dtype or self._meta.dtype, memory or _Memory()))

    def viewed(self, expression: Expression, *, class_dim: int | None = None) -> Tensor:
        """New deferred logits that may be a view of these, with the vocabulary as their last dimension by default."""
        self._memory.has_views = True
        class_dim = len(expression.lead) if class_dim is None else class_dim
        return self.like(expression, class_dim=class_dim, memory=self._memory)

    def refuse_if_viewed(self, name: str) -> None:
        """Raises if writing to these logits would have to show in others that were made from them."""
        if self._memory.has_views:
            raise RuntimeError(
                f"{name} writes to deferred logits of which there are views, which would not see the change. Write "
                "before taking views, or use the function that returns a new tensor."
            )

    @classmethod
    def respond(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answers a torch function without computing logits where that is possible."""
        args = input_first(args, kwargs)
        deferred = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DeferredLogits)]
        for logits in deferred:
            logits._pass_markers()
        if not any(logits._is_real() for logits in deferred):
            if args and isinstance(args[0], DeferredLogits) and needs_no_values(func):
                return without_values(func, args, kwargs)
            result = answer(func, args, kwargs)
            if result is not NotImplemented:
                return result
        return _run_on_real(func, args, kwargs)

    def _pass_markers(self) -> None:
        """Stands for what DeepSpeed was given, if DeepSpeed made this tensor.

        ZeRO-3 passes every output of a module through an autograd node that gathers the weights in backward and
        leaves the gradient as it is. What comes out is a tensor without the logits' own graph, in front of that node.
        A loss doesn't need it: the request to the head passes through such a node itself.
        """
        with torch._C.DisableTorchFunctionSubclass():
            node = last = self.grad_fn
        while node is not None and getattr(node, "_forward_cls", type(node)).__module__.startswith("deepspeed."):
            node = node.next_functions[0][0]
        if node is not last and isinstance(node, _Anchor._backward_cls):
            self.become(node.expression)

    def _is_real(self) -> bool:
        """Whether the real logits were written to, directly or through a slice of them, so that only they count."""
        if self._real is not None and _version(self._real) != self._real_version:
            self._real_only = True
        return self._real_only


def defer_logits(hidden: Tensor, head: Head, *, split: Mapping[str, int], run: Run | None = None) -> DeferredLogits:
    """The logits ``head(hidden)``, to be computed when and as far as something needs them.

    Args:
        hidden: (\\*lead, D).
        head: a ``LinearHead`` or a ``ModuleHead`` with V entries of the vocabulary.
        split: ``{"num_chunks": M}`` or ``{"chunk_tokens": c}``: the mini-sequences of a loss on the result.
        run: runs a request with the head's weights at hand. Default: with ``head``. A module whose weights are
            gathered only while it runs (FSDP, ZeRO) runs the request inside its forward. Heads whose ``run`` are equal
            are asked once when logits of both are needed together.

    Returns:
        (\\*lead, V), in the dtype that the head would give under the present autocast state. Its ``grad_fn`` leads to
        ``hidden`` and the head's parameters.

    Raises:
        ValueError: if ``hidden`` doesn't fit the head.
    """
    head.check(hidden)
    if run is None:

        def run(request: Request, hidden: Tensor) -> tuple[Tensor, ...]:
            return request(hidden, head)

    autocast = AutocastState.now(hidden.device)
    versions = tuple(map(_version, head.parameters))
    source = Source(run, dict(split), head.vocab_size, autocast, head.parameters, versions)
    expression = Expression(Logits(0, source), (hidden,))
    if not torch.is_grad_enabled():
        expression = expression.detached()
    dtype = head.logits_dtype(hidden, autocast)
    return _attached(DeferredLogits(expression, hidden.dim() - 1, dtype, _Memory()))


# --- graph ---


def _attached(deferred: DeferredLogits) -> DeferredLogits:
    """Gives deferred logits a ``grad_fn`` for whoever searches the graph (DDP with unused parameters does)."""
    parents = deferred._expression.parents() if torch.is_grad_enabled() else []
    return _Anchor.apply([deferred], *parents) if parents else deferred


class _Anchor(torch.autograd.Function):
    """Leads from deferred logits to what they depend on. A loss on them has a graph of its own."""

    @staticmethod
    def forward(ctx: Any, holder: list[DeferredLogits], *parents: Tensor) -> DeferredLogits:
        # In a list: a tensor that is input and output of a node would be replaced by a view of itself.
        ctx.expression = holder[0]._expression
        return holder[0]

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "A gradient reached deferred logits themselves. Use a loss on them, or logits.real() for a plain tensor."
        )


# --- real logits ---

_asked: set[str] = set()


def _warn_once(asked_by: str, logits: DeferredLogits) -> None:
    if asked_by in _asked:
        return
    _asked.add(asked_by)
    meta = logits._meta
    size = meta.shape.numel() * meta.dtype.itemsize / 2**30
    warnings.warn(
        f"{asked_by} needs the real logits, so all of them are computed: shape {tuple(meta.shape)}, {meta.dtype}, "
        f"{size:.3g} GiB. The result is the same; the memory that the mini-sequence LM head saves is not saved here. "
        "A loss by torch.nn.functional.cross_entropy does not need them, and neither does what takes a few numbers per "
        "token from them, such as logsumexp, log_softmax with gather, or topk. (Shown once per function.)",
        DeferredLogitsWarning,
        stacklevel=4,
    )


def _run_on_real(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        name = getter_name(func) or name
    found: list[DeferredLogits] = []

    def to_real(tensor: DeferredLogits) -> Tensor:
        found.append(tensor)
        return tensor.real(asked_by=name)

    real_args, real_kwargs = tree_map_only(DeferredLogits, to_real, (args, dict(kwargs)))
    writes = _writes(func)
    result = func(*real_args, **real_kwargs)
    for tensor in found:
        if tensor._is_real() or (writes and tensor is args[0]):
            tensor.refuse_if_viewed(name)
            tensor._real_only = True
            result = tensor if result is tensor._real else result
    return result


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; inference tensors don't count."""
    return 0 if tensor.is_inference() else tensor._version


def _writes(func: Callable[..., Any]) -> bool:
    """Whether a torch function does something to its first tensor that later ones must find done."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name.startswith("__i") or name in ("__setitem__", "__set__", "register_hook", "retain_grad")
