"""Deferred logits: a tensor that remembers how to compute itself, so that a loss on it runs in mini-sequences.

An LM head that answers with deferred logits of shape (B, S, V) has computed nothing yet. What a program then does to
them decides what is computed:

1. Pointwise work with scalars (``float()``, ``* scale``, ``tanh``: soft-caps and temperatures) is written down.
2. Shape work that leaves the vocabulary axis whole (``view(-1, V)``, ``[..., :-1, :]``, ``transpose(1, 2)``) is done
   on the hidden states.
3. ``torch.nn.functional.cross_entropy`` runs op 2 on the hidden states; ``argmax`` over the vocabulary walks chunks.
4. Anything else gets the real logits, computed once, with a warning that names who asked.

So the loss may live anywhere (in the model, in a training step, in a trainer) and no code of it has to change.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_mst.ops.context import AutocastState, first_order_only
from lightning_mst.ops.deferred_functions import Step, answer, chain, is_metadata, project
from lightning_mst.ops.metadata import getter_name

Request = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, ...]]
"""What is asked of a head: a function of the hidden states (..., D), its weight (V, D) and its bias (V,)."""

Run = Callable[[Request, Tensor], tuple[Tensor, ...]]
"""How to ask a head: runs a request on hidden states, with the head's weights at hand."""


class DeferredLogitsWarning(UserWarning):
    """Real logits were computed because something asked for them."""


@dataclass
class _Source:
    """Where logits come from; shared by all deferred logits that were made from one another."""

    run: Run
    split: Mapping[str, int]
    vocab_size: int
    autocast: AutocastState
    weights: tuple[Tensor, ...]
    weight_versions: tuple[int, ...]
    has_views: bool = False


@dataclass(frozen=True)
class _Meta:
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


class DeferredLogits(torch.Tensor):
    """Logits that are not computed until something needs them. Made by ``defer_logits``."""

    _source: _Source
    _hidden: Tensor  # (*lead, D)
    _steps: tuple[Step, ...]
    _class_dim: int  # where the vocabulary is among the dimensions
    _is_detached: bool
    _hidden_version: int
    _real: Tensor | None  # the real logits, once computed
    _real_version: int
    _real_only: bool  # something was done to them, so only they count

    @staticmethod
    def __new__(
        cls, source: _Source, hidden: Tensor, steps: tuple[Step, ...], class_dim: int, dtype: torch.dtype
    ) -> DeferredLogits:
        """Makes the tensor without a graph; ``_attach`` gives it one."""
        shape = list(hidden.shape[:-1])
        shape.insert(class_dim, source.vocab_size)
        result = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)
        result._source, result._hidden, result._steps, result._class_dim = source, hidden, steps, class_dim
        result._hidden_version = _version(hidden)
        result._is_detached, result._real, result._real_version, result._real_only = False, None, 0, False
        return result

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
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self._is_detached):
                self._real = self._ask(project).movedim(-1, self._class_dim)
            self._real_version = _version(self._real)
        return self._real

    @property
    def _meta(self) -> _Meta:
        """The tensor's own shape, dtype, ... without a detour through ``__torch_function__``."""
        with torch._C.DisableTorchFunctionSubclass():
            return _Meta(self.shape, self.dtype, self.device, self.requires_grad)

    def _ask(self, request: Callable[..., tuple[Tensor, ...]], **options: Any) -> Tensor:
        fn = chain(self._steps)
        self._check_unchanged()

        def bound(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
            return request(hidden, weight, bias, logits_fn=fn, split=self._source.split, **options)

        with self._source.autocast.restored():
            answer = self._source.run(bound, self._hidden)
        if not isinstance(answer, tuple) or len(answer) != 1:
            raise RuntimeError(
                "A forward hook of the LM head changed the answer to a request for its loss: expected a tuple of one "
                f"tensor, got {type(answer).__name__}. In mini-sequence form the head is called a second time for its "
                "loss; let the hook leave tuples alone, or set lm_head_chunks=None."
            )
        return answer[0]

    def _check_unchanged(self) -> None:
        source = self._source
        versions = tuple(map(_version, source.weights))
        if versions != source.weight_versions or _version(self._hidden) != self._hidden_version:
            raise RuntimeError(
                "The LM head's weights or its input changed after the head was called (an optimizer step between the "
                "logits and the loss?), so its deferred logits can't be computed any more. Compute the loss first, or "
                "keep real logits: logits.real()."
            )

    def _like(self, hidden: Tensor, *, class_dim: int | None = None, steps: tuple[Step, ...] | None = None) -> Tensor:
        self._check_unchanged()
        steps = self._steps if steps is None else steps
        dtype = steps[-1].dtype if steps else self._meta.dtype
        result = DeferredLogits(self._source, hidden, steps, self._class_dim if class_dim is None else class_dim, dtype)
        result._is_detached = self._is_detached or not torch.is_grad_enabled()
        return _attach(result, self._meta.requires_grad)

    def _view(self, hidden: Tensor, *, class_dim: int | None = None) -> Tensor:
        self._source.has_views = True
        return self._like(hidden, class_dim=class_dim)

    def refuse_if_viewed(self, name: str) -> None:
        """Raises if writing to these logits would have to show in others that were made from them."""
        if self._source.has_views:
            raise RuntimeError(
                f"{name} writes to deferred logits of which there are views, which would not see the change. Write "
                "before taking views, or use the function that returns a new tensor."
            )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answers a torch function without computing logits where that is possible."""
        kwargs = dict(kwargs or {})
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        subject = args[0] if args else None
        if isinstance(subject, DeferredLogits) and not subject._is_real():
            if is_metadata(func, args):
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            result = answer(func, args, kwargs)
            if result is not NotImplemented:
                return result
        return _run_on_real(func, args, kwargs)

    def _is_real(self) -> bool:
        """Whether the real logits were written to, directly or through a slice of them, so that only they count."""
        if self._real is not None and _version(self._real) != self._real_version:
            self._real_only = True
        return self._real_only

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answers code that comes from below Python, such as autograd's own, with the real logits."""
        args, kwargs = tree_map_only(DeferredLogits, lambda t: t.real(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:
        """Shape and dtype; printing the values would compute them."""
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def defer_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    split: Mapping[str, int],
    run: Run | None = None,
) -> DeferredLogits:
    """The logits ``linear(hidden, weight, bias)``, to be computed when and as far as something needs them.

    Args:
        hidden: (\\*lead, D).
        weight: (V, D).
        bias: (V,) or ``None``.
        split: ``{"num_chunks": M}`` or ``{"chunk_tokens": c}``: the mini-sequences of a loss on the result.
        run: runs a request with the head's weights at hand. Default: with ``weight`` and ``bias``. A module whose
            weights are gathered only while it runs (FSDP, ZeRO) runs the request inside its forward.

    Returns:
        (\\*lead, V), in the dtype that the linear layer would give under the present autocast state. Its ``grad_fn``
        leads to ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: if the last dimensions of ``hidden`` and ``weight`` differ.
    """
    if hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden (..., D) and weight (V, D) must share D; got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    if run is None:

        def run(request: Request, hidden: Tensor) -> tuple[Tensor, ...]:
            return request(hidden, weight, bias)

    autocast = AutocastState.now(hidden.device)
    dtype = autocast.cast(hidden.new_empty(0)).dtype
    weights = tuple(t for t in (weight, bias) if t is not None)
    source = _Source(run, dict(split), weight.shape[0], autocast, weights, tuple(map(_version, weights)))
    result = DeferredLogits(source, hidden, (), hidden.dim() - 1, dtype)
    result._is_detached = not torch.is_grad_enabled()
    return _attach(result, any(t.requires_grad for t in (hidden, *weights)))


# --- graph ---


def _attach(deferred: DeferredLogits, needs_graph: bool) -> DeferredLogits:
    """Gives deferred logits a ``grad_fn`` for whoever searches the graph (DDP with unused parameters does)."""
    if not needs_graph or deferred._is_detached:
        return deferred
    return _Anchor.apply([deferred], deferred._hidden, *deferred._source.weights)


class _Anchor(torch.autograd.Function):
    """Leads from deferred logits to what they depend on. A loss on them has a graph of its own."""

    @staticmethod
    def forward(ctx: Any, holder: list[DeferredLogits], *parents: Tensor) -> DeferredLogits:
        # In a list: a tensor that is input and output of a node would be replaced by a view of itself.
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
        "A loss by torch.nn.functional.cross_entropy does not need them. (Shown once per function.)",
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
        if tensor._is_real() or writes:
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
