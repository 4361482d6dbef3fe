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
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from lightning_mst.ops.chunking import chunk_bounds, resolve_num_chunks
from lightning_mst.ops.context import AutocastState
from lightning_mst.ops.linear_cross_entropy import linear_cross_entropy

Request = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, ...]]
"""What is asked of a head: a function of the hidden states (..., D), its weight (V, D) and its bias (V,)."""

Run = Callable[[Request, Tensor], tuple[Tensor, ...]]
"""How to ask a head: runs a request on hidden states, with the head's weights at hand."""


class DeferredLogitsWarning(UserWarning):
    """Real logits were computed because something asked for them."""


@dataclass(frozen=True)
class _Step:
    """One recorded pointwise function and the dtype that it gave."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dtype: torch.dtype

    def __call__(self, logits: Tensor) -> Tensor:
        return self.fn(logits, *self.args, **self.kwargs).to(self.dtype)


@dataclass
class _Source:
    """Where logits come from; shared by deferred logits that are views of each other."""

    run: Run
    split: Mapping[str, int]
    vocab_size: int
    autocast: AutocastState
    has_views: bool = field(default=False)


class DeferredLogits(torch.Tensor):
    """Logits that are not computed until something needs them. Made by ``defer_logits``."""

    _source: _Source
    _hidden: Tensor  # (*lead, D)
    _steps: tuple[_Step, ...]
    _class_dim: int  # where the vocabulary is among the dimensions
    _is_detached: bool
    _real: Tensor | None  # the real logits, once computed
    _real_only: bool  # they were written to, so only they count

    @staticmethod
    def __new__(
        cls, source: _Source, hidden: Tensor, steps: tuple[_Step, ...], class_dim: int, dtype: torch.dtype
    ) -> DeferredLogits:
        """Makes the tensor without a graph; ``_attach`` gives it one."""
        shape = list(hidden.shape[:-1])
        shape.insert(class_dim, source.vocab_size)
        result = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)
        result._source, result._hidden, result._steps, result._class_dim = source, hidden, steps, class_dim
        result._is_detached, result._real, result._real_only = False, None, False
        return result

    def real(self, asked_by: str | None = None) -> Tensor:
        """The real logits: computed at the first call and kept.

        Args:
            asked_by: who needs them, for the warning; no warning if ``None``.

        Returns:
            A plain tensor of this tensor's shape and dtype, with a graph if this has one and gradients are enabled.
        """
        needs_graph = torch.is_grad_enabled() and _metadata(self).requires_grad
        if self._real is None or (needs_graph and not self._real.requires_grad and not self._real_only):
            if asked_by is not None:
                _warn_once(asked_by, self)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self._is_detached):
                self._real = self._ask(_project).movedim(-1, self._class_dim)
        return self._real

    def _ask(self, request: Callable[..., tuple[Tensor, ...]], **options: Any) -> Tensor:
        fn = _chain(self._steps)

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

    def _like(self, hidden: Tensor, *, class_dim: int | None = None, steps: tuple[_Step, ...] | None = None) -> Tensor:
        steps = self._steps if steps is None else steps
        dtype = steps[-1].dtype if steps else _metadata(self).dtype
        result = DeferredLogits(self._source, hidden, steps, self._class_dim if class_dim is None else class_dim, dtype)
        result._is_detached = self._is_detached
        return _attach(result, _metadata(self).requires_grad)

    def _view(self, hidden: Tensor, *, class_dim: int | None = None) -> Tensor:
        self._source.has_views = True
        return self._like(hidden, class_dim=class_dim)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answers a torch function without computing logits where that is possible."""
        kwargs = kwargs or {}
        if func in _METADATA or _getter_name(func) in _METADATA_NAMES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        subject = args[0] if args else kwargs.get("input")
        handler = _HANDLERS.get(func)
        if handler is not None and isinstance(subject, DeferredLogits) and not subject._real_only:
            result = handler(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return _run_on_real(func, args, kwargs)

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
    source = _Source(run, dict(split), weight.shape[0], autocast)
    result = DeferredLogits(source, hidden, (), hidden.dim() - 1, dtype)
    tensors = [t for t in (hidden, weight, bias) if t is not None]
    needs_graph = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return _attach(result, needs_graph, *tensors)


# --- graph ------------------------------------------------------------------------------------------------------


def _attach(deferred: DeferredLogits, needs_graph: bool, *parents: Tensor) -> DeferredLogits:
    """Gives deferred logits a ``grad_fn`` for whoever searches the graph (DDP with unused parameters does)."""
    if not (needs_graph and torch.is_grad_enabled()) or deferred._is_detached:
        return deferred
    return _Anchor.apply([deferred], *(parents or (deferred._hidden,)))


class _Anchor(torch.autograd.Function):
    """Leads from deferred logits to what they depend on. A loss on them has a graph of its own."""

    @staticmethod
    def forward(ctx: Any, holder: list[DeferredLogits], *parents: Tensor) -> DeferredLogits:
        # In a list: a tensor that is input and output of a node would be replaced by a view of itself.
        return holder[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "A gradient reached deferred logits themselves. Use a loss on them, or logits.real() for a plain tensor."
        )


# --- requests ---------------------------------------------------------------------------------------------------


def _chain(steps: tuple[_Step, ...]) -> Callable[[Tensor], Tensor] | None:
    if not steps:
        return None

    def apply(logits: Tensor) -> Tensor:
        for step in steps:
            logits = step(logits)
        return logits

    return apply


def _project(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, logits_fn: Any, split: Mapping[str, int]
) -> tuple[Tensor, ...]:
    logits = F.linear(hidden, weight, bias)
    return (logits if logits_fn is None else logits_fn(logits),)


def _loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, labels: Tensor, split: Any, **options: Any) -> Any:
    return (linear_cross_entropy(hidden, weight, labels, bias=bias, **split, **options),)


def _arg_largest(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, logits_fn: Any, split: Mapping[str, int]
) -> tuple[Tensor, ...]:
    flat = hidden.reshape(-1, hidden.shape[-1])  # (*lead, D) -> (tokens, D)
    result = torch.empty(flat.shape[0], dtype=torch.int64, device=flat.device)
    limits = {"num_chunks": None, "chunk_tokens": None, **split}
    for start, stop in chunk_bounds(flat.shape[0], resolve_num_chunks(flat.shape[0], **limits)):
        (logits,) = _project(flat[start:stop], weight, bias, logits_fn=logits_fn, split=split)
        result[start:stop] = logits.argmax(dim=-1)
    return (result.view(hidden.shape[:-1]),)


# --- torch functions --------------------------------------------------------------------------------------------

_asked: set[str] = set()


def _warn_once(asked_by: str, logits: DeferredLogits) -> None:
    if asked_by in _asked:
        return
    _asked.add(asked_by)
    meta = _metadata(logits)
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
        name = _getter_name(func) or name
    found: list[DeferredLogits] = []

    def to_real(tensor: DeferredLogits) -> Tensor:
        found.append(tensor)
        return tensor.real(asked_by=name)

    real_args, real_kwargs = tree_map_only(DeferredLogits, to_real, (args, dict(kwargs)))
    versions = [t.real()._version for t in found]
    result = func(*real_args, **real_kwargs)
    for tensor, version in zip(found, versions, strict=True):
        real = tensor.real()
        if real._version != version:
            _refuse_if_viewed(tensor, name)
            tensor._real_only = True
            result = tensor if result is real else result
    return result


def _refuse_if_viewed(logits: DeferredLogits, name: str) -> None:
    if logits._source.has_views:
        raise RuntimeError(
            f"{name} writes to deferred logits of which there are views, which would not see the change. Write before "
            "taking views, or use the function that returns a new tensor."
        )


def _metadata(logits: Tensor) -> Any:
    """The tensor's own shape, dtype, ... without a detour through ``__torch_function__``."""
    with torch._C.DisableTorchFunctionSubclass():
        return _Metadata(logits.shape, logits.dtype, logits.device, logits.requires_grad)


@dataclass(frozen=True)
class _Metadata:
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


def _getter_name(func: Any) -> str | None:
    owner = getattr(func, "__self__", None)
    return getattr(owner, "__name__", None) if getattr(func, "__name__", "") == "__get__" else None


_METADATA = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.ndimension,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.get_device,
    torch.Tensor.is_contiguous,
    torch.Tensor.register_hook,
    torch.Tensor.__len__,
    torch.Tensor.__hash__,
    torch.Tensor.__repr__,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
_METADATA_NAMES = {
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "is_leaf", "is_cuda", "is_cpu", "is_meta",
    "is_mps", "is_xla", "is_xpu", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "itemsize", "nbytes", "grad",
    "retains_grad", "output_nr", "_backward_hooks", "_version", "names",
}  # fmt: skip

_HANDLERS: dict[Any, Callable[..., Any]] = {}


def _handles(*funcs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        _HANDLERS.update(dict.fromkeys(funcs, handler))
        return handler

    return register


def _both(*names: str) -> list[Any]:
    """The functions of these names in ``torch`` and the methods of ``torch.Tensor``, whichever exist."""
    owners = (torch, torch.Tensor)
    return [getattr(owner, name) for name in names for owner in owners if hasattr(owner, name)]


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not isinstance(value, DeferredLogits) and value.dim() == 0 and not value.requires_grad
    return not isinstance(value, (list, tuple))


def _record(func: Callable[..., Any], logits: DeferredLogits, args: Any, kwargs: Any) -> tuple[_Step, ...] | None:
    """The steps with one more, or ``None`` if it is not pointwise work with scalars."""
    if "out" in kwargs or not all(_is_scalar(a) for a in (*args, *kwargs.values())):
        return None
    meta = _metadata(logits)
    dtype = func(torch.ones((), dtype=meta.dtype, device=meta.device).expand(1), *args, **kwargs).dtype
    return (*logits._steps, _Step(func, args, dict(kwargs), dtype))


@_handles(
    *_both(
        "abs", "add", "clamp", "clamp_max", "clamp_min", "clip", "div", "divide", "exp", "mul", "multiply", "neg",
        "negative", "pow", "relu", "sigmoid", "sin", "sub", "subtract", "tanh", "true_divide",
        "__add__", "__mul__", "__neg__", "__pow__", "__radd__", "__rmul__", "__rsub__", "__rtruediv__", "__sub__",
        "__truediv__", "float", "double", "half", "bfloat16",
    ),
    F.tanh, F.sigmoid, F.relu, F.softplus, F.hardtanh,
)  # fmt: skip
def _pointwise(func: Any, logits: Any, *args: Any, **kwargs: Any) -> Any:
    steps = _record(func, logits, args, kwargs)
    return NotImplemented if steps is None else logits._like(logits._hidden, steps=steps)


# An in-place function and the one that returns a new tensor instead.
_IN_PLACE = {
    getattr(torch.Tensor, name): getattr(torch.Tensor, plain)
    for name, plain in {
        "add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div", "tanh_": "tanh", "clamp_": "clamp", "neg_": "neg",
        "__iadd__": "add", "__isub__": "sub", "__imul__": "mul", "__itruediv__": "div",
    }.items()
}  # fmt: skip


@_handles(*_IN_PLACE)
def _pointwise_in_place(func: Any, logits: Any, *args: Any, **kwargs: Any) -> Any:
    steps = _record(_IN_PLACE[func], logits, args, kwargs)
    if steps is None:
        return NotImplemented
    _refuse_if_viewed(logits, func.__name__)
    last = steps[-1]
    logits._steps = (*steps[:-1], _Step(last.fn, last.args, last.kwargs, _metadata(logits).dtype))
    logits._real = None
    return logits


@_handles(torch.Tensor.to, torch.Tensor.type_as)
def _to(func: Any, logits: Any, *args: Any, **kwargs: Any) -> Any:
    meta = _metadata(logits)
    target = func(torch.empty(0, dtype=meta.dtype, device=meta.device), *args, **kwargs)
    if target.device != meta.device:
        return NotImplemented
    if target.dtype == meta.dtype:
        return logits
    return _pointwise(torch.Tensor.to, logits, target.dtype)


@_handles(*_both("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"))
def _reshape(func: Any, logits: Any, *args: Any, **kwargs: Any) -> Any:
    vocab_size = logits._source.vocab_size
    if any(isinstance(a, torch.dtype) for a in args) or not _class_is_last(logits) or vocab_size == 1:
        return NotImplemented
    # Row-major order is kept, so rows of V stay rows of V wherever V is still the last dimension.
    shape = func(torch.empty(_metadata(logits).shape, device="meta"), *args, **kwargs).shape
    if not shape or shape[-1] != vocab_size:
        return NotImplemented
    return logits._view(logits._hidden.reshape(*shape[:-1], logits._hidden.shape[-1]), class_dim=len(shape) - 1)


@_handles(torch.Tensor.contiguous)
def _contiguous(func: Any, logits: Any, **_: Any) -> Any:
    return logits


@_handles(torch.clone, torch.Tensor.clone)
def _clone(func: Any, logits: Any, **_: Any) -> Any:
    return logits._like(logits._hidden)


@_handles(torch.detach, torch.Tensor.detach)
def _detach(func: Any, logits: Any) -> Any:
    logits._source.has_views = True
    with torch.no_grad():
        result = logits._like(logits._hidden.detach())
    result._is_detached = True
    return result


@_handles(*_both("transpose", "permute", "swapaxes", "swapdims", "movedim"))
def _permute(func: Any, logits: Any, *args: Any, **kwargs: Any) -> Any:
    meta = _metadata(logits)
    # A meta tensor whose strides say which dimension is which.
    marks = torch.empty_strided((2,) * len(meta.shape), tuple(range(1, len(meta.shape) + 1)), device="meta")
    order = [stride - 1 for stride in func(marks, *args, **kwargs).stride()]
    class_dim = order.index(logits._class_dim)
    lead = [d if d < logits._class_dim else d - 1 for d in order if d != logits._class_dim]
    return logits._view(logits._hidden.permute(*lead, -1), class_dim=class_dim)


@_handles(torch.Tensor.__getitem__)
def _getitem(func: Any, logits: Any, index: Any) -> Any:
    if not _class_is_last(logits):
        return NotImplemented
    parts = [
        part if part is None or part is Ellipsis or isinstance(part, (int, slice, Tensor)) else torch.as_tensor(part)
        for part in (index if isinstance(index, tuple) else (index,))
    ]
    dims = len(_metadata(logits).shape)
    used = 0
    for part in parts:
        if isinstance(part, bool):
            return NotImplemented
        if isinstance(part, Tensor) and part.dtype == torch.bool:
            used += part.dim()
        elif part is not None and part is not Ellipsis:
            used += 1
    on_last_dim = used == dims or (any(p is Ellipsis for p in parts) and parts[-1] is not Ellipsis)
    if on_last_dim:
        # The last index falls on the vocabulary: only all of it may be taken.
        last = parts[-1]
        if not (
            isinstance(last, slice) and last.indices(logits._source.vocab_size) == (0, logits._source.vocab_size, 1)
        ):
            return NotImplemented
        parts[-1] = slice(None)
    hidden = logits._hidden[tuple(parts)]
    return logits._view(hidden, class_dim=hidden.dim() - 1)


def _along(func: Any, logits: Any, dim: int, *args: Any) -> Any:
    """Runs a function of (tensor, ..., dim) that cuts or picks along a dimension other than the vocabulary."""
    dims = len(_metadata(logits).shape)
    if not _class_is_last(logits) or not -dims <= dim < dims or dim % dims == logits._class_dim:
        return NotImplemented
    result = func(logits._hidden, *args)
    if isinstance(result, Tensor):
        return logits._view(result, class_dim=result.dim() - 1)
    return tuple(logits._view(part, class_dim=part.dim() - 1) for part in result)


@_handles(*_both("chunk"))
def _chunk(func: Any, logits: Any, chunks: int, dim: int = 0) -> Any:
    return _along(torch.chunk, logits, dim, chunks, dim)


@_handles(*_both("split"))
def _split(func: Any, logits: Any, split_size: Any, dim: int = 0) -> Any:
    return _along(torch.split, logits, dim, split_size, dim)


@_handles(*_both("narrow"))
def _narrow(func: Any, logits: Any, dim: int, start: int, length: int) -> Any:
    return _along(torch.narrow, logits, dim, dim, start, length)


@_handles(*_both("select"))
def _select(func: Any, logits: Any, dim: int, index: int) -> Any:
    return _along(torch.select, logits, dim, dim, index)


@_handles(*_both("unbind"))
def _unbind(func: Any, logits: Any, dim: int = 0) -> Any:
    return _along(torch.unbind, logits, dim, dim)


@_handles(*_both("index_select"))
def _index_select(func: Any, logits: Any, dim: int, index: Tensor) -> Any:
    return _along(torch.index_select, logits, dim, dim, index)


@_handles(*_both("argmax"))
def _argmax(func: Any, logits: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    if dim is None or dim % len(_metadata(logits).shape) != logits._class_dim:
        return NotImplemented
    with torch.no_grad():
        result = logits._ask(_arg_largest)
    return result.unsqueeze(logits._class_dim) if keepdim else result


@_handles(F.cross_entropy)
def _cross_entropy(
    func: Any,
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    meta = _metadata(input)
    learned = weight is not None and weight.requires_grad
    if size_average is not None or reduce is not None or target.is_floating_point() or learned:
        return NotImplemented
    if input._class_dim != min(1, len(meta.shape) - 1):
        return NotImplemented
    tokens = tuple(s for d, s in enumerate(meta.shape) if d != input._class_dim)
    if tuple(target.shape) != tokens:
        raise ValueError(
            f"Labels must have shape {tokens} for logits of shape {tuple(meta.shape)}; got {tuple(target.shape)}."
        )
    with torch.set_grad_enabled(torch.is_grad_enabled() and not input._is_detached):
        return input._ask(
            _loss,
            labels=target,
            class_weights=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )


def _class_is_last(logits: DeferredLogits) -> bool:
    return logits._class_dim == len(_metadata(logits).shape) - 1
