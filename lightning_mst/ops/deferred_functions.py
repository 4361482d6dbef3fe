"""What deferred logits answer to torch functions: the table behind ``DeferredLogits``.

Each handler takes the function itself, the deferred logits and the call's arguments. It returns the answer, or
``NotImplemented`` where only the real logits can give it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mst.ops.chunking import chunk_bounds, resolve_num_chunks
from lightning_mst.ops.linear_cross_entropy import linear_cross_entropy
from lightning_mst.ops.metadata import needs_no_values

HANDLERS: dict[Any, Callable[..., Any]] = {}


@dataclass(frozen=True)
class Step:
    """One recorded pointwise function and the dtype that it gave."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dtype: torch.dtype

    def __call__(self, logits: Tensor) -> Tensor:
        """Does it again, on some of the real logits."""
        return self.fn(logits, *self.args, **self.kwargs).to(self.dtype)


def chain(steps: tuple[Step, ...]) -> Callable[[Tensor], Tensor] | None:
    """All steps as one function, or ``None`` if there are none."""
    if not steps:
        return None

    def apply(logits: Tensor) -> Tensor:
        for step in steps:
            logits = step(logits)
        return logits

    return apply


# --- what a head is asked ---


def project(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, logits_fn: Any, split: Mapping[str, int]
) -> tuple[Tensor, ...]:
    """The real logits (..., V) of hidden states (..., D)."""
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
        (logits,) = project(flat[start:stop], weight, bias, logits_fn=logits_fn, split=split)
        result[start:stop] = logits.argmax(dim=-1)
    return (result.view(hidden.shape[:-1]),)


def is_metadata(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a torch function on deferred logits asks for something that needs no values, such as a shape."""
    if func is torch.Tensor.register_hook:
        # FSDP marks where backward enters a module. A user's hook wants the gradient of the logits.
        return str(getattr(args[1], "__module__", "")).startswith("torch.distributed.")
    return needs_no_values(func)


def answer(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What deferred logits, the first of ``args``, answer to a torch function; ``NotImplemented`` if nothing."""
    handler = HANDLERS.get(func)
    if handler is None:
        return NotImplemented
    try:
        inspect.signature(handler).bind(func, *args, **kwargs)
    except TypeError:
        # A spelling that the handler doesn't know; the real function will know whether it is right.
        return NotImplemented
    return handler(func, *args, **kwargs)


def _handles(*funcs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        HANDLERS.update(dict.fromkeys(funcs, handler))
        return handler

    return register


def _both(*names: str) -> list[Any]:
    """The functions of these names in ``torch`` and the methods of ``torch.Tensor``, whichever exist."""
    owners = (torch, torch.Tensor)
    return [getattr(owner, name) for name in names for owner in owners if hasattr(owner, name)]


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.requires_grad
    return not isinstance(value, (list, tuple))


def _record(func: Callable[..., Any], logits: Any, args: Any, kwargs: Any) -> tuple[Step, ...] | None:
    """The steps with one more, or ``None`` if it is not pointwise work with scalars."""
    if "out" in kwargs or not all(_is_scalar(a) for a in (*args, *kwargs.values())):
        return None
    meta = logits._meta
    dtype = func(torch.ones((), dtype=meta.dtype, device=meta.device).expand(1), *args, **kwargs).dtype
    # A scalar tensor may be overwritten before the logits are computed.
    args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
    kwargs = {name: a.clone() if isinstance(a, Tensor) else a for name, a in kwargs.items()}
    return (*logits._steps, Step(func, args, kwargs, dtype))


@_handles(
    *_both(
        "abs", "add", "clamp", "clamp_max", "clamp_min", "clip", "div", "divide", "exp", "mul", "multiply", "neg",
        "negative", "pow", "relu", "sigmoid", "sin", "sub", "subtract", "tanh", "true_divide",
        "__add__", "__mul__", "__neg__", "__pow__", "__radd__", "__rmul__", "__rsub__", "__rtruediv__", "__sub__",
        "__truediv__", "float", "double", "half", "bfloat16",
    ),
    F.tanh, F.sigmoid,
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
    # Real logits that were handed out have to see the change.
    if steps is None or logits._real is not None:
        return NotImplemented
    logits.refuse_if_viewed(func.__name__)
    last = steps[-1]
    logits._steps = (*steps[:-1], Step(last.fn, last.args, last.kwargs, logits._meta.dtype))
    return logits


@_handles(torch.Tensor.to, torch.Tensor.type_as)
def _to(func: Any, logits: Any, *args: Any, **kwargs: Any) -> Any:
    meta = logits._meta
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
    shape = func(torch.empty(logits._meta.shape, device="meta"), *args, **kwargs).shape
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
    meta = logits._meta
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
        part if part is None or part is Ellipsis or isinstance(part, (int, slice, Tensor)) else _as_index(part)
        for part in (index if isinstance(index, tuple) else (index,))
    ]
    dims = len(logits._meta.shape)
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


def _as_index(values: Any) -> Tensor:
    index = torch.as_tensor(values)
    return index.long() if index.numel() == 0 else index  # an empty list is taken for numbers


def _along(func: Any, logits: Any, dim: int, *args: Any) -> Any:
    """Runs a function of (tensor, ..., dim) that cuts or picks along a dimension other than the vocabulary."""
    dims = len(logits._meta.shape)
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
def _argmax(func: Any, logits: Any, dim: int | None = None, keepdim: bool = False, *, axis: int | None = None) -> Any:
    dim = axis if dim is None else dim
    if dim is None or dim % len(logits._meta.shape) != logits._class_dim:
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
    meta = input._meta
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


def _class_is_last(logits: Any) -> bool:
    return logits._class_dim == len(logits._meta.shape) - 1
