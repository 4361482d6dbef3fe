"""Op 2: LM head and cross-entropy in mini-sequence form.

``cross_entropy(logits_fn(head(hidden)), labels)`` without ever holding the (tokens, V) logits. One chunk of logits at
a time is computed and turned into its own gradient, from which the gradients of the hidden states and of the head's
parameters follow at once, in the forward pass: 3 matmuls, where checkpointing the chunks takes 4. Backward only scales
them by the incoming gradient.

Beyond its inputs this holds O(tokens * D + V * D + chunk_tokens * V) instead of several times O(tokens * V).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_mst.ops.chunking import chunk_bounds, resolve_num_chunks
from lightning_mst.ops.context import AutocastState, RNGState, drop_autocast_copies, first_order_only
from lightning_mst.ops.head_chunks import HALF, head_chunks
from lightning_mst.ops.heads import Head, LinearHead, ModuleHead
from lightning_mst.ops.rehearsal import walk

LogitsFn = Callable[[Tensor], Tensor]

# A chunk's softmax is worked out in so many blocks of rows, each small enough for a cache: its temporaries then take a
# few per cent of the chunk's bytes instead of several times as many.
_BLOCKS_PER_CHUNK = 64


@dataclass(frozen=True)
class _Spec:
    """What the loss is, apart from its tensors."""

    head: Head
    num_chunks: int
    mean: bool
    ignore_index: int
    label_smoothing: float
    z_loss: float
    logits_fn: LogitsFn | None
    class_weights: Tensor | None
    autocast: AutocastState
    count_correct: bool
    grads: bool


@torch.compiler.disable
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
    return head_cross_entropy(
        hidden,
        LinearHead(weight, bias),
        labels,
        num_chunks=num_chunks,
        chunk_tokens=chunk_tokens,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logits_fn=logits_fn,
        class_weights=class_weights,
        return_num_correct=return_num_correct,
    )


@torch.compiler.disable
def head_cross_entropy(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
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
    """Cross-entropy of any LM head over mini-sequences: ``linear_cross_entropy`` for heads that are more than that.

    Each chunk of a ``ModuleHead`` runs with a graph of its own, from which its parameters get one gradient each, added
    up over the chunks in fp32 if they are half precision. Frozen parameters cost nothing.

    Args:
        hidden: (\\*lead, D), the head's input.
        head: a ``LinearHead`` or a ``ModuleHead``.
        labels: (\\*lead), integer class indices in [0, V) or ``ignore_index``. Shift them before the call.
        num_chunks: as in ``linear_cross_entropy``, like all that follow.
        chunk_tokens: the most tokens in a mini-sequence.
        ignore_index: the label of tokens that have no loss.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: in [0, 1].
        z_loss: coefficient of the squared log-sum-exp.
        logits_fn: a differentiable function of rows of logits, or ``None``.
        class_weights: (V,), or ``None``.
        return_num_correct: also return how many live tokens the logits' arg-max gets right.

    Returns:
        What ``linear_cross_entropy`` returns.

    Raises:
        ValueError: for shapes or options that don't fit together.
        IndexError: for a label that is neither in [0, V) nor ``ignore_index``.
        RuntimeError: if the head uses a tensor that needs a gradient and is not among its parameters.
    """
    _check(hidden, head, labels, class_weights, reduction, label_smoothing)
    flat_labels = labels.reshape(-1).long()
    live = flat_labels != ignore_index
    rows = live.nonzero().squeeze(1)
    _check_range(flat_labels[rows], head.vocab_size, ignore_index)
    spec = _Spec(
        head=head,
        num_chunks=resolve_num_chunks(rows.numel(), num_chunks=num_chunks, chunk_tokens=chunk_tokens),
        mean=reduction == "mean",
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logits_fn=logits_fn,
        class_weights=class_weights,
        autocast=AutocastState.now(hidden.device),
        count_correct=return_num_correct,
        # Under no_grad the autograd node would not know that nobody will ask for gradients.
        grads=torch.is_grad_enabled(),
    )
    flat = hidden.reshape(-1, hidden.shape[-1])  # (*lead, D) -> (tokens, D)
    node = _LossPerToken if reduction == "none" else _LossWithGrads
    loss, correct = node.apply(spec, rows, flat_labels, flat, *head.parameters)
    if reduction == "none":
        loss = loss.view(labels.shape)
    return (loss, correct) if return_num_correct else loss


def _check(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    class_weights: Tensor | None,
    reduction: str,
    label_smoothing: float,
) -> None:
    head.check(hidden)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must have one entry per token, shape {tuple(hidden.shape[:-1])}; got {tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integer class indices; got dtype {labels.dtype}.")
    if class_weights is not None and class_weights.shape != (head.vocab_size,):
        raise ValueError(f"class_weights must have shape ({head.vocab_size},); got {tuple(class_weights.shape)}.")
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
    hidden_grad: Tensor | None  # (tokens, D)
    parameter_grads: list[Tensor | None]  # one per parameter of the head


def _walk(
    spec: _Spec,
    rows: Tensor,
    labels: Tensor,
    hidden: Tensor,
    *,
    need: Sequence[bool] | None = None,
    scale: float | Tensor = 1.0,
) -> _Result:
    """Walks the live tokens chunk by chunk.

    Args:
        spec: the loss.
        rows: (live,), which tokens are live.
        labels: (tokens,).
        hidden: (tokens, D).
        need: whether gradients of hidden and of each of the head's parameters are wanted. Default: none.
        scale: factor of each token's loss in those gradients: a number, or (live,) in the loss's dtype.
    """
    need_hidden, *need_parameters = [False] * (1 + len(spec.head.parameters)) if need is None else need
    need_grad = need_hidden or any(need_parameters)
    all_live = rows.numel() == hidden.shape[0]
    bounds = chunk_bounds(rows.numel(), spec.num_chunks)
    hidden_grad: Tensor | None = None
    if need_hidden:
        hidden_grad = torch.empty_like(hidden) if all_live else torch.zeros_like(hidden)
    losses: Tensor | None = None
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    chunks = head_chunks(
        spec.head, spec.autocast, need_hidden=need_hidden, need_parameters=need_parameters, bounds=bounds
    )
    with spec.autocast.disabled():
        for start, stop in walk(bounds):
            which = slice(start, stop) if all_live else rows[start:stop]
            logits, grad = chunks.logits(hidden[which])  # (chunk, V)
            for low, high in walk(chunk_bounds(stop - start, min(_BLOCKS_PER_CHUNK, max(1, stop - start)))):
                block_scale = scale[start + low : start + high, None] if isinstance(scale, Tensor) else scale
                into = grad[low:high] if need_grad else None
                loss, hits = _block(spec, logits[low:high], labels[which][low:high], into, block_scale)
                if losses is None:
                    losses = loss.new_empty(rows.numel())
                losses[start + low : start + high] = loss
                if hits is not None:
                    correct += hits
            if need_grad:
                into = hidden_grad[which] if hidden_grad is not None and all_live else None
                chunk_grad = chunks.differentiate(grad, into)
                if hidden_grad is not None and chunk_grad is not None and chunk_grad is not into:
                    hidden_grad[which] = chunk_grad.to(hidden_grad.dtype)
    if spec.autocast.enabled and isinstance(spec.head, ModuleHead):
        drop_autocast_copies()
    if losses is None:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        losses = torch.zeros(0, dtype=dtype, device=hidden.device)
    return _Result(losses, correct, hidden_grad, chunks.parameter_grads())


def _block(
    spec: _Spec, logits: Tensor, labels: Tensor, into: Tensor | None, scale: float | Tensor
) -> tuple[Tensor, Tensor | None]:
    """Losses of a few rows, and ``scale`` times their gradient where one is needed.

    Args:
        spec: the loss.
        logits: (rows, V), before ``logits_fn``.
        labels: (rows,), all live.
        into: (rows, V), where to write the gradient of the logits; maybe ``logits`` itself. ``None`` if not needed.
        scale: a number, or (rows, 1).

    Returns:
        The losses, (rows,), fp32 or fp64, and the number of right arg-maxes where it was asked for.
    """
    source, need_grad = logits, into is not None
    if spec.logits_fn is not None:
        with torch.enable_grad(), spec.autocast.restored():
            source = logits.detach().requires_grad_(need_grad)
            shaped = spec.logits_fn(source.view_as(source))
    else:
        shaped = logits
    values = shaped.detach()
    if values.dtype in HALF:
        values = values.float()
    labels = labels.unsqueeze(1)  # (rows,) -> (rows, 1)
    # Before the gradient takes the place of the logits.
    hits = (values.argmax(dim=1, keepdim=True) == labels).sum() if spec.count_correct else None
    if need_grad:
        grad = torch.softmax(values, dim=1)  # (rows, V)
        # At its largest entry the softmax is at least 1 / V, so this loses nothing, and it saves the exponentials of a
        # second pass.
        lse = values.amax(dim=1, keepdim=True) - grad.amax(dim=1, keepdim=True).log()  # (rows, 1)
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

    if into is not None:
        of_softmax = of_softmax * scale
        at_label = grad.gather(1, labels) * of_softmax - of_label * scale
        # Straight to where it belongs, if it is all there is to do: a copy would be one more pass over the block.
        scaled = grad if smoothing or spec.logits_fn is not None else into
        torch.mul(grad, of_softmax, out=scaled)
        scaled.scatter_(1, labels, at_label.to(scaled.dtype))
        if smoothing:
            scaled -= even * scale
        if spec.logits_fn is not None:
            (scaled,) = torch.autograd.grad(shaped, source, scaled.to(shaped.dtype))
        if scaled is not into:
            into.copy_(scaled)
    return loss.squeeze(1), hits


class _LossWithGrads(torch.autograd.Function):
    """Mean or sum: the gradients are formed in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, spec: _Spec, rows: Tensor, labels: Tensor, hidden: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        need = ctx.needs_input_grad[3:] if spec.grads else None
        count: float = 1.0
        if spec.mean:
            count = float(rows.numel())
            if spec.class_weights is not None:
                count = float(spec.class_weights[labels[rows]].sum())
        # The exact factor 1 / count goes into the fp32 gradient of the logits; what is left for backward is a power
        # of two (times the incoming gradient), which does not round half-precision gradients a second time.
        power = 2.0 ** math.ceil(math.log2(count)) if count > 0 else 1.0
        result = _walk(spec, rows, labels, hidden, need=need, scale=power / count if count > 0 else 0.0)
        ctx.power = power
        ctx.dtypes = [t.dtype for t in (hidden, *parameters)]
        ctx.save_for_backward(result.hidden_grad, *result.parameter_grads)
        ctx.mark_non_differentiable(result.correct)
        loss = result.losses.sum()
        return (loss / count if count != 0 else loss * math.nan) if spec.mean else loss, result.correct

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
        return (None, None, None, *scaled)


def _scaled(tensor: Tensor, scale: Tensor, *, in_place: bool) -> Tensor:
    result = tensor if in_place else torch.empty_like(tensor)
    if tensor.dtype not in HALF:
        return torch.mul(tensor, scale.to(tensor.dtype), out=result)
    # A half-precision tensor would round the scale to half precision first, so go through fp32, a slice at a time.
    for source, into in zip(*(torch.atleast_1d(t).split(4096) for t in (tensor, result)), strict=True):
        into.copy_(source.float().mul_(scale))
    return result


class _LossPerToken(torch.autograd.Function):
    """No reduction: backward knows each token's incoming gradient and walks the chunks again."""

    @staticmethod
    def forward(
        ctx: Any, spec: _Spec, rows: Tensor, labels: Tensor, hidden: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        # A head with dropout must draw in backward what it draws now.
        ctx.rng = RNGState(hidden.device) if isinstance(spec.head, ModuleHead) else None
        result = _walk(spec, rows, labels, hidden)
        ctx.spec = spec
        # The parameters too, as any layer saves them: autograd then notices if one was changed before backward.
        ctx.save_for_backward(rows, labels, hidden, *parameters)
        ctx.mark_non_differentiable(result.correct)
        losses = result.losses.new_zeros(labels.shape[0])
        losses[rows] = result.losses
        return losses, result.correct

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rows, labels, hidden, *parameters = ctx.saved_tensors
        with nullcontext() if ctx.rng is None else ctx.rng.replayed():
            result = _walk(ctx.spec, rows, labels, hidden, need=ctx.needs_input_grad[3:], scale=grad[rows])
        grads = (
            None if g is None else g.to(t.dtype)
            for g, t in zip((result.hidden_grad, *result.parameter_grads), (hidden, *parameters), strict=True)
        )
        return (None, None, None, *grads)
