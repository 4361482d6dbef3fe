"""One chunk of logits after the other, each followed by its own backward pass, without a graph of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from lightning_mst.ops.chunking import chunk_bounds
from lightning_mst.ops.context import AutocastState
from lightning_mst.ops.gradients import GradientSums, check_graph
from lightning_mst.ops.heads import Head, LinearHead, ModuleHead
from lightning_mst.ops.rehearsal import walk

HALF = (torch.float16, torch.bfloat16)
# Half-precision weight gradients are added to their fp32 sum in so many slices of the vocabulary.
WEIGHT_SLICES = 16


def head_chunks(
    head: Head,
    autocast: AutocastState,
    *,
    need_hidden: bool,
    need_parameters: Sequence[bool],
    bounds: list[tuple[int, int]],
) -> LinearChunks | ModuleChunks:
    """The walk that fits the head.

    Args:
        head: the head.
        autocast: the state in which the head runs.
        need_hidden: whether gradients of the hidden states are wanted.
        need_parameters: whether those of each of ``head.parameters`` are.
        bounds: (start, stop) of each chunk.
    """
    form = LinearChunks if isinstance(head, LinearHead) else ModuleChunks
    return form(head, autocast, need_hidden, need_parameters, bounds)  # type: ignore[arg-type]


class LinearChunks:
    """A linear head: one buffer holds every chunk's logits and then, in their place, their gradient."""

    def __init__(
        self,
        head: LinearHead,
        autocast: AutocastState,
        need_hidden: bool,
        need_parameters: Sequence[bool],
        bounds: list[tuple[int, int]],
    ) -> None:
        weight, bias = head.weight, head.bias
        self._autocast = autocast
        self._need_hidden = need_hidden
        self._weight = autocast.cast(weight)
        self._bias = None if bias is None else autocast.cast(bias)
        # Fresh pages cost as much time as the softmax.
        self._buffer = self._weight.new_empty(max(stop - start for start, stop in bounds), head.vocab_size)
        self._grads: list[Tensor | None] = [None for _ in head.parameters]
        wide = torch.float64 if self._weight.dtype == torch.float64 else torch.float32
        if need_parameters[0]:
            sum_dtype = wide if len(bounds) > 1 or weight.dtype not in HALF else weight.dtype
            self._grads[0] = torch.zeros(weight.shape, dtype=sum_dtype, device=weight.device)
        if bias is not None and need_parameters[1]:
            self._grads[1] = torch.zeros(bias.shape, dtype=wide, device=bias.device)

    def logits(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, V) of a chunk of hidden states (n, D), and where to write their gradient."""
        self._rows = self._autocast.cast(rows)
        logits = self._buffer[: rows.shape[0]]
        if self._bias is None:
            torch.mm(self._rows, self._weight.t(), out=logits)
        else:
            torch.addmm(self._bias, self._rows, self._weight.t(), out=logits)
        return logits, logits

    def differentiate(self, grad: Tensor, into: Tensor | None) -> Tensor | None:
        """Adds up the parameters' gradients; returns that of the chunk of hidden states, written to ``into`` if given.

        Args:
            grad: (n, V), the gradient of the logits that ``logits`` last gave.
            into: (n, D), a place in the result, or ``None`` if it has none.
        """
        weight_grad = self._grads[0]
        bias_grad = self._grads[-1] if self._bias is not None else None
        if weight_grad is not None and weight_grad.dtype == grad.dtype:
            weight_grad.addmm_(grad.t(), self._rows)
        elif weight_grad is not None:
            slices = chunk_bounds(weight_grad.shape[0], min(WEIGHT_SLICES, weight_grad.shape[0]))
            for low, high in walk(slices):
                weight_grad[low:high] += grad[:, low:high].t() @ self._rows
        if bias_grad is not None:
            bias_grad += grad.sum(0, dtype=bias_grad.dtype)
        if not self._need_hidden:
            return None
        if into is None or into.dtype != grad.dtype:
            return grad @ self._weight
        return torch.mm(grad, self._weight, out=into)

    def parameter_grads(self) -> list[Tensor | None]:
        """One for each of the head's parameters, those of half precision maybe still in fp32."""
        return self._grads


class ModuleChunks:
    """Any other head: each chunk has a graph of its own, which is used and dropped before the next."""

    def __init__(
        self,
        head: ModuleHead,
        autocast: AutocastState,
        need_hidden: bool,
        need_parameters: Sequence[bool],
        bounds: list[tuple[int, int]],
    ) -> None:
        self._head = head
        self._autocast = autocast
        self._need_hidden = need_hidden
        self._need_parameters = need_parameters
        self._trained = [p for p, need in zip(head.parameters, need_parameters, strict=True) if need]
        self._sums = GradientSums(self._trained, len(bounds), taken=[])
        self._first = True

    def logits(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, V) of a chunk of hidden states (n, D), and where to write their gradient."""
        needed = self._need_hidden or bool(self._trained)
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(needed))
            stack.enter_context(self._autocast.restored())
            self._rows = rows.detach().requires_grad_(self._need_hidden)
            # Module hooks such as FlopCounterMode's refuse a leaf under autograd.grad, so the head gets a view.
            self._logits = self._head(self._rows.view_as(self._rows))
        expected = (rows.shape[0], self._head.vocab_size)
        if tuple(self._logits.shape) != expected:
            raise ValueError(
                f"The head must map rows {tuple(rows.shape)} to logits {expected}; it returned "
                f"{tuple(self._logits.shape)}."
            )
        if self._first and needed:
            check_graph([self._logits], [self._rows, *self._head.parameters], "ModuleHead.parameters")
        self._first = False
        values = self._logits.detach()
        # The graph may have saved the logits themselves, so their gradient gets a place of its own.
        return values, torch.empty_like(values) if needed else values

    def differentiate(self, grad: Tensor, into: Tensor | None) -> Tensor | None:
        """Adds up the parameters' gradients; returns that of the chunk of hidden states.

        Args:
            grad: (n, V), the gradient of the logits that ``logits`` last gave.
            into: not used.
        """
        logits, rows = self._logits, self._rows
        del self._logits, self._rows
        if not logits.requires_grad:
            return None
        with self._autocast.restored():
            grads = self._sums.differentiate([logits], [rows] if self._need_hidden else [], [grad])
        return grads[0] if grads else None

    def parameter_grads(self) -> list[Tensor | None]:
        """One for each of the head's parameters, ``None`` for one that needs none or was not used."""
        sums = iter(self._sums.take())
        return [next(sums) if need else None for need in self._need_parameters]
