"""Op 2: LM head and cross-entropy in mini-sequence form.

``cross_entropy(logits_fn(linear(hidden, weight, bias)), labels)`` without ever holding the (tokens, V) logits. One
chunk of logits at a time is computed and turned, in place, into its own gradient, from which the gradients of the
hidden states and of the weight follow at once, in the forward pass: 3 matmuls, where checkpointing the chunks takes 4.
Backward only scales them by the incoming gradient.

Beyond its inputs this holds O(tokens * D + V * D + chunk_tokens * V) instead of several times O(tokens * V).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_mst.ops.chunking import chunk_bounds, resolve_num_chunks
from lightning_mst.ops.context import AutocastState, first_order_only

LogitsFn = Callable[[Tensor], Tensor]

_HALF = (torch.float16, torch.bfloat16)
# A chunk's softmax is worked out in so many blocks of rows, each small enough for a cache: its temporaries then take a
# few per cent of the chunk's bytes instead of several times as many.
_BLOCKS_PER_CHUNK = 64
# Half-precision weight gradients are added to their fp32 sum in so many slices of the vocabulary.
_WEIGHT_SLICES = 16


@dataclass(frozen=True)
class _Spec:
    """What the loss is, apart from its tensors."""

    num_chunks: int
    ignore_index: int
    label_smoothing: float
    z_loss: float
    logits_fn: LogitsFn | None
    class_weights: Tensor | None
    autocast: AutocastState
    count_correct: bool


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    num_chunks: int | None = None,
    chunk_tokens: int | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logits_fn: LogitsFn | None = None,
    class_weights: Tensor | None = None,
    return_num_correct: bool = False,
) -> Any:
    """Cross-entropy of an LM head over mini-sequences, with the same loss and the same gradients as over the whole.

    Tokens whose label is ``ignore_index`` are dropped before the matmul and cost nothing. Logits are computed in the
    inputs' dtype (autocast's where it is on); log-sum-exp, loss and normalisation in fp32, or fp64 for fp64 logits.
    Half-precision weight gradients are added up over the chunks in fp32. With ``reduction="none"`` the gradients
    can't be formed before the incoming one is known, so backward computes the logits again: 4 matmuls.

    Args:
        hidden: (\\*lead, D), the head's input.
        weight: (V, D), the head's weight.
        labels: (\\*lead), integer class indices in [0, V) or ``ignore_index``. Shift them before the call.
        bias: (V,), or ``None``.
        num_chunks: number M of mini-sequences that the live tokens are split into; at most one per token is used.
        chunk_tokens: instead of ``num_chunks``: the most tokens in a mini-sequence.
        ignore_index: the label of tokens that have no loss.
        reduction: ``"mean"`` over the live tokens (weighted, with ``class_weights``), ``"sum"``, or ``"none"``.
        label_smoothing: in [0, 1], as in ``torch.nn.functional.cross_entropy``.
        z_loss: coefficient of the squared log-sum-exp that is added to each token's loss, in nats.
        logits_fn: a pointwise, differentiable function of the logits (scale, soft-cap, dtype), or ``None``. Must not
            use a tensor that needs a gradient.
        class_weights: (V,), a weight per class as in ``torch.nn.functional.cross_entropy``, or ``None``.
        return_num_correct: also return how many live tokens the logits' arg-max gets right.

    Returns:
        The loss in nats, fp32 (fp64 for fp64 logits): a scalar, or (\\*lead) with zeros at ignored labels. With every
        label ignored it is what ``F.cross_entropy`` gives (``nan`` for the mean, with zero gradients) and has a graph.
        With ``return_num_correct`` a pair of it and an int64 scalar.

    Raises:
        ValueError: for shapes or options that don't fit together.
        IndexError: for a label that is neither in [0, V) nor ``ignore_index``.

    Source: arXiv 2407.15892, section 3.2, with the mean over tokens in place of its mean over mini-sequences; z-loss
    from arXiv 2204.02311, section 5.
    """
    _check(hidden, weight, labels, bias, class_weights, reduction, label_smoothing)
    flat_labels = labels.reshape(-1).long()
    live = flat_labels != ignore_index
    rows = live.nonzero().squeeze(1)
    _check_range(flat_labels[rows], weight.shape[0], ignore_index)
    spec = _Spec(
        num_chunks=resolve_num_chunks(rows.numel(), num_chunks=num_chunks, chunk_tokens=chunk_tokens),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logits_fn=logits_fn,
        class_weights=class_weights,
        autocast=AutocastState.now(hidden.device),
        count_correct=return_num_correct,
    )
    flat = hidden.reshape(-1, hidden.shape[-1])  # (*lead, D) -> (tokens, D)
    if reduction == "none":
        loss, correct = _LossPerToken.apply(spec, rows, flat_labels, flat, weight, bias)
        loss = loss.view(labels.shape)
    else:
        # Under no_grad the Function would not know that nobody will ask for gradients.
        grads = torch.is_grad_enabled()
        loss, correct = _LossWithGrads.apply(spec, rows, flat_labels, flat, weight, bias, reduction == "mean", grads)
    return (loss, correct) if return_num_correct else loss


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    class_weights: Tensor | None,
    reduction: str,
    label_smoothing: float,
) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden (..., D) and weight (V, D) must share D; got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must have one entry per token, shape {tuple(hidden.shape[:-1])}; got {tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integer class indices; got dtype {labels.dtype}.")
    for name, vector in (("bias", bias), ("class_weights", class_weights)):
        if vector is not None and vector.shape != weight.shape[:1]:
            raise ValueError(f"{name} must have shape ({weight.shape[0]},); got {tuple(vector.shape)}.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}.")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1; got {label_smoothing!r}.")


def _check_range(live_labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    if live_labels.numel() == 0:
        return
    low, high = (int(t) for t in torch.stack(live_labels.aminmax()).tolist())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise IndexError(
            f"Label {wrong} is out of range: expected class indices from 0 to {vocab_size - 1}, or "
            f"ignore_index={ignore_index}. Check the tokenizer's vocabulary against the head's, and the label that "
            "marks padding."
        )


@dataclass
class _Result:
    """What a walk over the chunks yields; ``None`` for what was not asked for."""

    losses: Tensor  # (live tokens,)
    correct: Tensor
    hidden_grad: Tensor | None = None  # (tokens, D)
    weight_grad: Tensor | None = None  # (V, D), fp32 for half-precision logits of several chunks
    bias_grad: Tensor | None = None  # (V,)


def _walk(
    spec: _Spec,
    rows: Tensor,
    labels: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    need: tuple[bool, bool, bool] = (False, False, False),
    scale: float | Tensor = 1.0,
) -> _Result:
    """Walks the live tokens chunk by chunk.

    Args:
        spec: the loss.
        rows: (live,), which tokens are live.
        labels: (tokens,).
        hidden: (tokens, D).
        weight: (V, D).
        bias: (V,) or ``None``.
        need: whether gradients of hidden, weight and bias are wanted.
        scale: factor of each token's loss in those gradients: a number, or (live,) in the loss's dtype.
    """
    x, w = spec.autocast.cast(hidden), spec.autocast.cast(weight)
    b = None if bias is None else spec.autocast.cast(bias)
    num_tokens, vocab_size = hidden.shape[0], weight.shape[0]
    all_live = rows.numel() == num_tokens
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    bounds = chunk_bounds(rows.numel(), spec.num_chunks)
    most = max(stop - start for start, stop in bounds)
    # One buffer for the logits of every chunk: fresh pages cost as much time as the softmax.
    buffer = x.new_empty(most, vocab_size)

    need_hidden, need_weight, need_bias = need
    hidden_grad = weight_grad = bias_grad = None
    if need_hidden:
        hidden_grad = torch.empty_like(hidden) if all_live else torch.zeros_like(hidden)
    if need_weight:
        sum_dtype = wide if len(bounds) > 1 or weight.dtype not in _HALF else weight.dtype
        weight_grad = torch.zeros(weight.shape, dtype=sum_dtype, device=weight.device)
    if need_bias:
        bias_grad = torch.zeros(vocab_size, dtype=wide, device=weight.device)
    losses: Tensor | None = None
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)

    with spec.autocast.disabled():
        for start, stop in bounds:
            which = slice(start, stop) if all_live else rows[start:stop]
            x_chunk = x[which]  # (chunk, D)
            logits = buffer[: stop - start]  # (chunk, V)
            if b is None:
                torch.mm(x_chunk, w.t(), out=logits)
            else:
                torch.addmm(b, x_chunk, w.t(), out=logits)
            for low, high in chunk_bounds(stop - start, min(_BLOCKS_PER_CHUNK, max(1, stop - start))):
                block_scale = scale[start + low : start + high, None] if isinstance(scale, Tensor) else scale
                loss, hits = _block(spec, logits[low:high], labels[which][low:high], any(need), block_scale)
                if losses is None:
                    losses = loss.new_empty(rows.numel())
                losses[start + low : start + high] = loss
                if hits is not None:
                    correct += hits
            # From here on, ``logits`` holds the gradient of the logits.
            if hidden_grad is not None:
                if all_live and hidden_grad.dtype == logits.dtype:
                    torch.mm(logits, w, out=hidden_grad[which])
                else:
                    hidden_grad[which] = (logits @ w).to(hidden_grad.dtype)
            if weight_grad is not None:
                _add_weight_grad(weight_grad, logits, x_chunk)
            if bias_grad is not None:
                bias_grad += logits.sum(0, dtype=bias_grad.dtype)
    if losses is None:
        losses = torch.zeros(0, dtype=wide, device=hidden.device)
    return _Result(losses, correct, hidden_grad, weight_grad, bias_grad)


def _add_weight_grad(total: Tensor, logits_grad: Tensor, x: Tensor) -> None:
    if total.dtype == x.dtype:
        total.addmm_(logits_grad.t(), x)
        return
    for low, high in chunk_bounds(total.shape[0], min(_WEIGHT_SLICES, total.shape[0])):
        total[low:high] += logits_grad[:, low:high].t() @ x


def _block(
    spec: _Spec, logits: Tensor, labels: Tensor, need_grad: bool, scale: float | Tensor
) -> tuple[Tensor, Tensor | None]:
    """Losses of a few rows; overwrites ``logits`` with ``scale`` times the losses' gradient where one is needed.

    Args:
        spec: the loss.
        logits: (rows, V), before ``logits_fn``.
        labels: (rows,), all live.
        need_grad: whether to overwrite.
        scale: a number, or (rows, 1).

    Returns:
        The losses, (rows,), fp32 or fp64, and the number of right arg-maxes where it was asked for.
    """
    source = logits
    if spec.logits_fn is not None:
        with torch.enable_grad(), spec.autocast.restored():
            source = logits.detach().requires_grad_(need_grad)
            shaped = spec.logits_fn(source.view_as(source))
    else:
        shaped = logits
    values = shaped.detach()
    if values.dtype in _HALF:
        values = values.float()
    labels = labels.unsqueeze(1)  # (rows,) -> (rows, 1)
    largest, arg_largest = values.max(dim=1, keepdim=True)  # (rows, 1)
    if need_grad:
        grad = torch.softmax(values, dim=1)  # (rows, V)
        # At its largest entry the softmax is at least 1 / V, so this loses nothing, and it saves a second pass.
        lse = largest - grad.gather(1, arg_largest).log()
    else:
        lse = values.logsumexp(dim=1, keepdim=True)

    smoothing, classes = spec.label_smoothing, spec.class_weights
    of_label: float | Tensor = 1.0 - smoothing
    if classes is not None:
        classes = classes.to(values.dtype)
        of_label = classes[labels] * (1.0 - smoothing)
    loss = of_label * (lse - values.gather(1, labels))
    of_softmax = of_label
    even: float | Tensor = smoothing / values.shape[1]
    if smoothing:
        total = values.shape[1] if classes is None else classes.sum()
        dot = values.sum(1, keepdim=True) if classes is None else (values @ classes).unsqueeze(1)
        loss = loss + even * (total * lse - dot)
        of_softmax = of_softmax + even * total
        even = even if classes is None else even * classes
    if spec.z_loss:
        loss = loss + spec.z_loss * lse.square()
        of_softmax = of_softmax + 2.0 * spec.z_loss * lse

    if need_grad:
        grad.mul_(of_softmax * scale)
        label_grad = -of_label * scale * torch.ones_like(lse)
        grad.scatter_add_(1, labels, label_grad)
        if smoothing:
            grad -= even * scale
        if spec.logits_fn is not None:
            (grad,) = torch.autograd.grad(shaped, source, grad.to(shaped.dtype))
        logits.copy_(grad)
    hits = (arg_largest == labels).sum() if spec.count_correct else None
    return loss.squeeze(1), hits


class _LossWithGrads(torch.autograd.Function):
    """Mean or sum: the gradients are formed in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        spec: _Spec,
        rows: Tensor,
        labels: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mean: bool,
        grads: bool,
    ) -> tuple[Tensor, Tensor]:
        need = ctx.needs_input_grad[3:6] if grads else (False, False, False)
        count: float = 1.0
        if mean:
            count = float(rows.numel())
            if spec.class_weights is not None:
                count = float(spec.class_weights[labels[rows]].sum())
        # The exact factor 1 / count goes into the fp32 gradient of the logits; what is left for backward is a power
        # of two (times the incoming gradient), which does not round half-precision gradients a second time.
        power = 2.0 ** math.ceil(math.log2(count)) if count > 0 else 1.0
        result = _walk(spec, rows, labels, hidden, weight, bias, need=need, scale=power / count if count > 0 else 0.0)
        ctx.power = power
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(result.hidden_grad, result.weight_grad, result.bias_grad)
        ctx.mark_non_differentiable(result.correct)
        loss = result.losses.sum()
        return (loss / count if count != 0 else loss * math.nan) if mean else loss, result.correct

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # With retain_graph the saved gradients are needed again; without, they are scaled where they are.
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        scale = grad / ctx.power
        scaled = (
            None if t is None else _scaled(t, scale, in_place=not keep).to(dtype)
            for t, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (None, None, None, *scaled, None, None)


def _scaled(tensor: Tensor, scale: Tensor, *, in_place: bool) -> Tensor:
    result = tensor if in_place else torch.empty_like(tensor)
    if tensor.dtype not in _HALF:
        return torch.mul(tensor, scale.to(tensor.dtype), out=result)
    # A half-precision tensor would round the scale to half precision first, so go through fp32, a slice at a time.
    for source, into in zip(tensor.split(4096), result.split(4096), strict=True):
        into.copy_(source.float().mul_(scale))
    return result


class _LossPerToken(torch.autograd.Function):
    """No reduction: backward knows each token's incoming gradient and walks the chunks again."""

    @staticmethod
    def forward(
        ctx: Any, spec: _Spec, rows: Tensor, labels: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        result = _walk(spec, rows, labels, hidden, weight, bias)
        ctx.spec = spec
        ctx.save_for_backward(rows, labels, hidden, weight, bias)
        ctx.mark_non_differentiable(result.correct)
        losses = result.losses.new_zeros(labels.shape[0])
        losses[rows] = result.losses
        return losses, result.correct

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rows, labels, hidden, weight, bias = ctx.saved_tensors
        need = ctx.needs_input_grad[3:6]
        result = _walk(ctx.spec, rows, labels, hidden, weight, bias, need=need, scale=grad[rows])
        grads = (
            None if g is None else g.to(t.dtype)
            for g, t in zip(
                (result.hidden_grad, result.weight_grad, result.bias_grad), (hidden, weight, bias), strict=True
            )
        )
        return (None, None, None, *grads)
