"""Deferred logits under functions that leave little of the vocabulary: they run chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mst.ops.context import AutocastState
from lightning_mst.ops.deferred_table import both, handles, is_class_dim, is_deferred
from lightning_mst.ops.evaluation import cross_entropy, gather, in_chunks
from lightning_mst.ops.expression import Call, Expression, Inputs, detached
from lightning_mst.ops.head_chunks import HALF


def reduced(fn: Callable[..., Any], logits: Any, *others: Any) -> tuple[Tensor, ...]:
    """Runs a function on rows of logits, chunk by chunk.

    Args:
        fn: takes (n, V), and rows (n, d) of each of the others; returns tensors (n, ...).
        logits: the deferred logits.
        others: deferred logits of the same shape, or tensors (\\*lead, d).

    Returns:
        (\\*lead, ...) for each tensor that ``fn`` returns.
    """
    inputs = Inputs()
    nodes = []
    for part in (logits, *others):
        if is_deferred(part):
            part.check_unchanged()
            nodes.append(inputs.join(part._expression))
        else:
            nodes.append(inputs.add(part))
    call = Call(fn, tuple(nodes), {}, AutocastState.now(logits._meta.device))
    return in_chunks(Expression(call, tuple(inputs.tensors)))


def _placed(logits: Any, result: Tensor, keepdim: bool) -> Tensor:
    return result.unsqueeze(logits._class_dim) if keepdim else result


@handles(*both("sum", "mean"))
def _sum(func: Any, logits: Any, dim: Any = None, keepdim: bool = False, *, axis: Any = None, dtype: Any = None) -> Any:
    dims = len(logits._meta.shape)
    dim = axis if dim is None else dim
    named = (dim,) if isinstance(dim, int) else dim or range(dims)  # none named means all
    if not all(isinstance(d, int) and -dims <= d < dims for d in named):
        return NotImplemented
    over = {d % dims for d in named}
    if logits._class_dim not in over:
        return NotImplemented
    plain = torch.mean if func.__name__ == "mean" else torch.sum
    if len(over) == 1:
        (result,) = reduced(lambda rows: plain(rows, -1, dtype=dtype), logits)
        return _placed(logits, result, keepdim)
    # The sums of the tokens are added up like the entries themselves: in fp32 if those are of half precision.
    sample = plain(torch.ones(1, 1, dtype=logits._meta.dtype, device=logits._meta.device), -1, dtype=dtype)
    wide = torch.float32 if sample.dtype in HALF else sample.dtype
    (result,) = reduced(lambda rows: torch.sum(rows, -1, dtype=wide), logits)
    result = result.unsqueeze(logits._class_dim).sum(tuple(over), keepdim=keepdim)
    if plain is torch.mean:
        result = result / torch.Size(logits._meta.shape[d] for d in over).numel()
    return result.to(sample.dtype)


@handles(*both("logsumexp", "amax", "amin"))
def _reduce(func: Any, logits: Any, dim: Any, keepdim: bool = False) -> Any:
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        (dim,) = dim
    if not is_class_dim(logits, dim):
        return NotImplemented
    plain = getattr(torch, func.__name__)
    (result,) = reduced(lambda rows: plain(rows, -1), logits)
    return _placed(logits, result, keepdim)


@handles(*both("all", "any"))
def _test(func: Any, logits: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    if dim is not None and not is_class_dim(logits, dim):
        return NotImplemented
    plain = getattr(torch, func.__name__)
    (result,) = reduced(lambda rows: plain(rows, -1), logits)
    return plain(result) if dim is None else _placed(logits, result, keepdim)


@handles(*both("argmax", "argmin"))
def _arg(func: Any, logits: Any, dim: int | None = None, keepdim: bool = False, *, axis: int | None = None) -> Any:
    if not is_class_dim(logits, axis if dim is None else dim):
        return NotImplemented
    plain = getattr(torch, func.__name__)
    with torch.no_grad():
        (result,) = reduced(lambda rows: plain(rows, -1), logits)
    return _placed(logits, result, keepdim)


@handles(*both("max", "min"))
def _extreme(func: Any, logits: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if not is_class_dim(logits, dim):
        return NotImplemented
    plain = getattr(torch, func.__name__)
    found = reduced(lambda rows: plain(rows, -1), logits)
    return getattr(torch.return_types, func.__name__)(_placed(logits, part, keepdim) for part in found)


@handles(*both("topk"))
def _topk(func: Any, logits: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if not is_class_dim(logits, dim):
        return NotImplemented
    found = reduced(lambda rows: torch.topk(rows, k, -1, largest, sorted), logits)
    return torch.return_types.topk(part.movedim(-1, logits._class_dim) for part in found)


@handles(*both("gather"))
def _gather(func: Any, logits: Any, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    if not is_class_dim(logits, dim) or is_deferred(index) or index.dtype != torch.int64:
        return NotImplemented
    if index.dim() != len(logits._meta.shape):
        return NotImplemented
    index = index.movedim(logits._class_dim, -1)  # (*lead, k)
    if index.shape[:-1] != logits._expression.lead:
        return NotImplemented
    logits.check_unchanged()
    return gather(logits._expression, index).movedim(-1, logits._class_dim)


@handles(*both("take_along_dim"))
def _take_along_dim(func: Any, logits: Any, indices: Tensor, dim: int | None = None) -> Any:
    return NotImplemented if dim is None else _gather(func, logits, dim, indices)


@handles(F.cross_entropy)
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
    if size_average is not None or reduce is not None or learned or not _classes_come_second(input):
        return NotImplemented
    if target.is_floating_point():
        return _soft_cross_entropy(input, target, weight, reduction, label_smoothing)
    _check_labels(input, target)
    input.check_unchanged()
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    loss = cross_entropy(input._expression, target, class_weights=weight, reduction=reduction, **options)
    if loss is not None:
        return loss

    def losses(rows: Tensor, labels: Tensor) -> Tensor:
        wide = rows.float() if meta.dtype in HALF else rows
        return F.cross_entropy(wide, labels.squeeze(-1), weight, reduction="none", **options)

    (loss,) = reduced(losses, input, target.unsqueeze(-1))
    return _over_live(loss, target, weight, ignore_index, reduction)


def _soft_cross_entropy(input: Any, target: Any, weight: Tensor | None, reduction: str, label_smoothing: float) -> Any:
    if target.shape != input.shape:
        return NotImplemented

    def losses(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(rows, wanted, weight, reduction="none", label_smoothing=label_smoothing)

    (loss,) = reduced(losses, input, target if is_deferred(target) else target.movedim(input._class_dim, -1))
    return {"none": lambda: loss, "sum": loss.sum, "mean": loss.mean}[reduction]()


@handles(F.nll_loss)
def _nll_loss(
    func: Any,
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    learned = weight is not None and weight.requires_grad
    if size_average is not None or reduce is not None or learned or not _classes_come_second(input):
        return NotImplemented
    _check_labels(input, target)
    input.check_unchanged()
    logits = _under_log_softmax(input)
    if logits is not None:
        options = {"class_weights": weight, "ignore_index": ignore_index, "reduction": reduction}
        loss = cross_entropy(logits, target, **options)
        if loss is not None:
            return loss

    def losses(rows: Tensor, labels: Tensor) -> Tensor:
        return F.nll_loss(rows, labels.squeeze(-1), weight, ignore_index=ignore_index, reduction="none")

    (loss,) = reduced(losses, input, target.unsqueeze(-1))
    return _over_live(loss, target, weight, ignore_index, reduction)


def _under_log_softmax(log_probs: Any) -> Expression | None:
    """What the log-softmax was taken of, if the expression ends in one."""
    root, inputs = log_probs._expression.root, log_probs._expression.inputs
    has_graph = not (isinstance(root, Call) and root.fn is torch.detach)
    if not has_graph:
        (root,) = root.args
    if not isinstance(root, Call) or root.fn is not torch.log_softmax:
        return None
    node, _, dtype = root.args
    if dtype is not None:
        node = Call(torch.Tensor.to, (node, dtype), {}, root.autocast, is_pointwise=True)
    return Expression(node if has_graph else detached(node, log_probs._meta.device), inputs)


def _classes_come_second(logits: Any) -> bool:
    """Whether the vocabulary stands where torch's losses look for the classes."""
    return logits._class_dim == min(1, len(logits._meta.shape) - 1)


def _check_labels(logits: Any, labels: Tensor) -> None:
    if labels.shape != logits._expression.lead:
        raise ValueError(
            f"Labels must have shape {tuple(logits._expression.lead)} for logits of shape "
            f"{tuple(logits._meta.shape)}; got {tuple(labels.shape)}."
        )


def _over_live(losses: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
    """Torch's mean divides by the number of live labels, or by the sum of their weights."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    live = labels != ignore_index
    weights = live if weight is None else torch.where(live, weight[labels.where(live, 0)], 0.0)
    return losses.sum() / weights.sum()
