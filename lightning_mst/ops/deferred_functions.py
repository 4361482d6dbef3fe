"""Deferred logits under functions that keep their shape: pointwise work, softmax, and losses entry by entry.

They are written down. Besides numbers they may take what is the same for every token (numbers as tensors, vectors over
the vocabulary), what has a row per token (masks, temperatures), and other deferred logits of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mst.ops.context import AutocastState
from lightning_mst.ops.deferred_table import both, handles, is_class_dim, is_deferred
from lightning_mst.ops.expression import Call, Expression, Inputs, Node


class _NotPerTokenError(Exception):
    """An argument is neither the same for all tokens nor has it a row for each."""


def write_down(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, is_pointwise: bool = True
) -> tuple[Any, Expression, torch.dtype] | None:
    """Adds a call to an expression.

    Args:
        func: the function; must keep the shape of rows (n, V).
        args: its arguments, deferred logits among them.
        kwargs: the same.
        is_pointwise: as in ``Call``.

    Returns:
        The deferred logits whose shape the result has, the result's expression and its dtype; ``None`` if an argument
        or the result doesn't fit.
    """
    main = next((value for value in (*args, *kwargs.values()) if is_deferred(value)), None)
    if main is None or "out" in kwargs:
        return None
    main.check_unchanged()
    inputs = Inputs()
    root = inputs.join(main._expression)
    call = Call(func, args, kwargs, AutocastState.now(main._meta.device), is_pointwise)
    try:
        written = call.with_values(lambda value: root if value is main else _operand(inputs, main, value))
    except _NotPerTokenError:
        return None
    sample = call.with_values(lambda value: _sample(main, value))
    result = func(*sample.args, **sample.kwargs)
    if not isinstance(result, Tensor) or result.shape != (1, 1) or result.device != main._meta.device:
        return None
    expression = Expression(written, tuple(inputs.tensors))
    return main, expression if result.is_floating_point() else expression.detached(), result.dtype


def _operand(inputs: Inputs, main: Any, value: Any) -> Node | Any:
    """An argument as a part of the expression.

    Plain tensors are copied where that is cheap: they may be overwritten before the logits are computed.
    """
    if isinstance(value, (list, tuple)):
        raise _NotPerTokenError
    if not isinstance(value, Tensor):
        return value
    shape, class_dim, lead = main._meta.shape, main._class_dim, main._expression.lead
    if is_deferred(value):
        if value._meta.shape != shape or value._class_dim != class_dim:
            raise _NotPerTokenError
        value.check_unchanged()
        return inputs.join(value._expression)
    if value.dim() == 0:
        return value.clone()
    if value.dim() > len(shape) or value.device != main._meta.device:
        raise _NotPerTokenError
    value = value[(None,) * (len(shape) - value.dim())]  # aligned at the right, as in broadcasting
    if any(size not in (1, whole) for size, whole in zip(value.shape, shape, strict=True)):
        raise _NotPerTokenError
    value = value.movedim(class_dim, -1)
    if value.shape[:-1].numel() == 1:
        return value.reshape(-1).clone()  # (1,) or (V,)
    if value.shape[-1] == 1:
        return inputs.add(value.expand(*lead, 1).clone())
    if value.shape[:-1] != lead:
        raise _NotPerTokenError
    return inputs.add(value)


def _sample(main: Any, value: Any) -> Any:
    """One entry in place of an argument, to see what dtype the function gives."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return torch.ones((1, 1), dtype=value.dtype, device=main._meta.device)


def recorded(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], **options: Any) -> Any:
    """The result of a function as deferred logits, or ``NotImplemented``; see ``write_down``."""
    written = write_down(func, args, kwargs, **options)
    if written is None:
        return NotImplemented
    main, expression, dtype = written
    return main.like(expression, dtype=dtype)


@handles(
    *both(
        "abs", "add", "clamp", "clamp_max", "clamp_min", "clip", "div", "divide", "exp", "expm1", "lerp", "log",
        "log1p", "logaddexp", "masked_fill", "maximum", "minimum", "mul", "multiply", "nan_to_num", "neg", "negative",
        "pow", "relu", "sigmoid", "sin", "sqrt", "square", "sub", "subtract", "tanh", "true_divide", "where", "xlogy",
        "__add__", "__mul__", "__neg__", "__pow__", "__radd__", "__rmul__", "__rsub__", "__rtruediv__", "__sub__",
        "__truediv__", "float", "double", "half", "bfloat16",
        "eq", "ne", "gt", "ge", "lt", "le", "isnan", "isinf", "isfinite", "logical_not",
        "__eq__", "__ne__", "__gt__", "__ge__", "__lt__", "__le__",
    ),
    F.tanh, F.sigmoid, F.logsigmoid, F.softplus,
    any_place=True,
)  # fmt: skip
def _pointwise(func: Any, *args: Any, **kwargs: Any) -> Any:
    return recorded(func, args, kwargs)


# An in-place function and the one that returns a new tensor instead.
_IN_PLACE = {
    getattr(torch.Tensor, name): getattr(torch.Tensor, plain)
    for name, plain in {
        "add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div", "tanh_": "tanh", "clamp_": "clamp", "neg_": "neg",
        "masked_fill_": "masked_fill",
        "__iadd__": "add", "__isub__": "sub", "__imul__": "mul", "__itruediv__": "div",
    }.items()
}  # fmt: skip


@handles(*_IN_PLACE)
def _pointwise_in_place(func: Any, logits: Any, *args: Any, **kwargs: Any) -> Any:
    # Real logits that were handed out have to see the change, and the graph of these is as it is.
    if logits._real is not None or any(isinstance(a, Tensor) and a.requires_grad for a in (*args, *kwargs.values())):
        return NotImplemented
    written = write_down(_IN_PLACE[func], (logits, *args), kwargs)
    if written is None:
        return NotImplemented
    logits.refuse_if_viewed(func.__name__)
    _, expression, dtype = written
    if dtype != logits._meta.dtype:
        autocast = AutocastState.now(logits._meta.device)
        root = Call(torch.Tensor.to, (expression.root, logits._meta.dtype), {}, autocast, is_pointwise=True)
        expression = Expression(root, expression.inputs)
    logits.become(expression)
    return logits


@handles(torch.Tensor.to, torch.Tensor.type_as)
def _to(func: Any, logits: Any, *args: Any, **kwargs: Any) -> Any:
    meta = logits._meta
    target = func(torch.empty(0, dtype=meta.dtype, device=meta.device), *args, **kwargs)
    if target.device != meta.device:
        return NotImplemented
    if target.dtype == meta.dtype:
        return logits
    return recorded(torch.Tensor.to, (logits, target.dtype), {})


@handles(*both("softmax", "log_softmax"), F.softmax, F.log_softmax)
def _softmax(func: Any, logits: Any, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None) -> Any:
    if not is_class_dim(logits, dim):
        return NotImplemented
    if isinstance(_stacklevel, torch.dtype):
        dtype = _stacklevel  # the third argument of all but those in torch.nn.functional
    plain = torch.log_softmax if func.__name__ == "log_softmax" else torch.softmax
    return recorded(plain, (logits, -1, dtype), {}, is_pointwise=False)


@handles(F.kl_div, F.mse_loss, any_place=True)
def _loss_by_entry(
    func: Any,
    input: Any,
    target: Any,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    **options: Any,
) -> Any:
    if size_average is not None or reduce is not None or input.shape != target.shape:
        return NotImplemented
    losses = recorded(func, (input, target), {"reduction": "none", **options})
    if losses is NotImplemented or reduction == "none":
        return losses
    if reduction == "mean":
        return losses.mean()
    if reduction == "batchmean":
        return losses.sum() / losses.shape[0]
    return losses.sum() if reduction == "sum" else NotImplemented
