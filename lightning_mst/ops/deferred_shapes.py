"""Deferred logits under shape work that leaves the vocabulary whole: it is done on their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_mst.ops.deferred_table import both, class_is_last, handles, is_class_dim, is_deferred
from lightning_mst.ops.evaluation import gather
from lightning_mst.ops.expression import Expression


@handles(*both("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"))
def _reshape(func: Any, logits: Any, *args: Any, **kwargs: Any) -> Any:
    vocab_size = logits._meta.shape[logits._class_dim]
    if any(isinstance(a, torch.dtype) for a in args) or not class_is_last(logits) or vocab_size == 1:
        return NotImplemented
    # Row-major order is kept, so rows of V stay rows of V wherever V is still the last dimension.
    shape = func(torch.empty(logits._meta.shape, device="meta"), *args, **kwargs).shape
    if not shape or shape[-1] != vocab_size:
        return NotImplemented
    return logits.viewed(
        logits._expression.reshaped(lambda t: t.reshape(*shape[:-1], t.shape[-1])), class_dim=len(shape) - 1
    )


@handles(torch.Tensor.contiguous)
def _contiguous(func: Any, logits: Any, **_: Any) -> Any:
    return logits


@handles(torch.clone, torch.Tensor.clone)
def _clone(func: Any, logits: Any, **_: Any) -> Any:
    return logits.like(logits._expression)


@handles(torch.detach, torch.Tensor.detach)
def _detach(func: Any, logits: Any) -> Any:
    with torch.no_grad():
        return logits.viewed(logits._expression, class_dim=logits._class_dim)


@handles(*both("transpose", "permute", "swapaxes", "swapdims", "movedim"))
def _permute(func: Any, logits: Any, *args: Any, **kwargs: Any) -> Any:
    dims, class_dim = len(logits._meta.shape), logits._class_dim
    # A meta tensor whose strides say which dimension is which.
    marks = torch.empty_strided((2,) * dims, tuple(range(1, dims + 1)), device="meta")
    order = [stride - 1 for stride in func(marks, *args, **kwargs).stride()]
    lead = [d if d < class_dim else d - 1 for d in order if d != class_dim]
    return logits.viewed(logits._expression.reshaped(lambda t: t.permute(*lead, -1)), class_dim=order.index(class_dim))


@handles(torch.Tensor.__getitem__)
def _getitem(func: Any, logits: Any, index: Any) -> Any:
    if not class_is_last(logits):
        return NotImplemented
    parts = [
        part if part is None or part is Ellipsis or isinstance(part, (int, slice, Tensor)) else _as_index(part)
        for part in (index if isinstance(index, tuple) else (index,))
    ]
    dims, vocab_size = len(logits._meta.shape), logits._meta.shape[-1]
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
        # The last index falls on the vocabulary: all of it may be taken, or one entry for each token.
        last = parts[-1]
        if not isinstance(last, slice):
            return _pick(logits, parts)
        if last.indices(vocab_size) != (0, vocab_size, 1):
            return NotImplemented
        parts[-1] = slice(None)
    return logits.viewed(logits._expression.reshaped(lambda t: t[tuple(parts)]))


def _pick(logits: Any, parts: list[Any]) -> Any:
    """``logits[i, j, entry]`` for index tensors."""
    *lead, entry = parts
    if not isinstance(entry, Tensor) or not all(_is_position(p) for p in parts):
        return NotImplemented
    expression = logits._expression.reshaped(lambda t: t[tuple(lead)])
    if not lead or torch.broadcast_shapes(expression.lead, entry.shape) != expression.lead:
        return NotImplemented
    logits.check_unchanged()
    entry = torch.where(entry < 0, entry + logits._meta.shape[-1], entry).expand(expression.lead)
    return gather(expression, entry.long().unsqueeze(-1)).squeeze(-1)


def _is_position(part: Any) -> bool:
    return isinstance(part, int) or (isinstance(part, Tensor) and part.dtype in (torch.int32, torch.int64))


def _as_index(values: Any) -> Tensor:
    index = torch.as_tensor(values)
    return index.long() if index.numel() == 0 else index  # an empty list is taken for numbers


def _along(logits: Any, dim: int, part: Callable[[Tensor], Any]) -> Any:
    """Does to every input what cuts or picks along a dimension other than the vocabulary."""
    dims = len(logits._meta.shape)
    if not class_is_last(logits) or not -dims <= dim < dims or is_class_dim(logits, dim):
        return NotImplemented
    expression = logits._expression
    parts = [part(t) for t in expression.inputs]
    if isinstance(parts[0], Tensor):
        return logits.viewed(Expression(expression.root, tuple(parts)))
    return tuple(logits.viewed(Expression(expression.root, inputs)) for inputs in zip(*parts, strict=True))


@handles(*both("chunk"))
def _chunk(func: Any, logits: Any, chunks: int, dim: int = 0) -> Any:
    return _along(logits, dim, lambda t: t.chunk(chunks, dim))


@handles(*both("split"))
def _split(func: Any, logits: Any, split_size: Any, dim: int = 0) -> Any:
    return _along(logits, dim, lambda t: t.split(split_size, dim))


@handles(*both("narrow"))
def _narrow(func: Any, logits: Any, dim: int, start: int, length: int) -> Any:
    return _along(logits, dim, lambda t: t.narrow(dim, start, length))


@handles(*both("select"))
def _select(func: Any, logits: Any, dim: int, index: int) -> Any:
    return _along(logits, dim, lambda t: t.select(dim, index))


@handles(*both("unbind"))
def _unbind(func: Any, logits: Any, dim: int = 0) -> Any:
    return _along(logits, dim, lambda t: t.unbind(dim))


@handles(*both("index_select"))
def _index_select(func: Any, logits: Any, dim: int, index: Tensor) -> Any:
    return _along(logits, dim, lambda t: t.index_select(dim, index))


@handles(torch.broadcast_tensors, any_place=True)
def _broadcast(func: Any, *tensors: Any) -> Any:
    shape = next(t._meta.shape for t in tensors if is_deferred(t))
    if any(t._meta.shape != shape if is_deferred(t) else not _expands(t, shape) for t in tensors):
        return NotImplemented
    return tuple(t if is_deferred(t) else t.expand(shape) for t in tensors)


def _expands(tensor: Any, shape: torch.Size) -> bool:
    return isinstance(tensor, Tensor) and torch.broadcast_shapes(tensor.shape, shape) == shape


@handles(torch.Tensor.register_hook)
def _register_hook(func: Any, logits: Any, hook: Callable[[Tensor], Any]) -> Any:
    # FSDP and DeepSpeed mark where backward enters a module (DeepSpeed scales the gradient there, too): at whatever is
    # computed from the logits that the module returned. A user's hook wants the gradient of the logits.
    origin = getattr(hook, "func", hook)
    if not str(getattr(origin, "__module__", "")).startswith(("torch.distributed.", "deepspeed.")):
        return NotImplemented
    for leaf in logits._expression.logits():
        if hook not in leaf.source.hooks:
            leaf.source.hooks.append(hook)
    with torch._C.DisableTorchFunctionSubclass():
        return func(logits, hook)


@handles(torch.Tensor.stride)
def _stride(func: Any, logits: Any, dim: int | None = None) -> Any:
    # Who asks for strides means to address memory by them, or to choose between that and plain torch functions.
    # There is no memory; zero says so, and whoever can do without takes the other way.
    return (0,) * len(logits._meta.shape) if dim is None else 0
