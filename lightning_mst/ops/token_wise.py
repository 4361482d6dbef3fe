"""Op 1: a token-wise block in mini-sequence form.

Arithmetic of one step, in units of one matmul of a gated MLP (its forward has three): without checkpointing 9; with
the layer checkpointed 11; the usual tiled MLP inside a checkpointed layer 15, because the tile and the layer both
recompute it; here 11 either way.

How, for ``y = block(x)``:

1. A first autograd node saves ``x`` and computes nothing.
2. A second node computes ``y`` chunk by chunk without a graph and saves nothing.
3. Backward, the second node hands its gradient to the first, which recomputes one chunk at a time with a graph
   (all but the last matmul), differentiates it and adds up the parameters' gradients.

Because everything that backward needs is saved *before* the block runs, non-reentrant checkpointing
(``torch.utils.checkpoint``, early stop) stops recomputing the enclosing layer there: the block is not run again.
Saved for backward: O(B * S * D) for ``x``, nothing that grows with the block's inner width.

The parameters are inputs of the node and get one gradient each, so hooks, DDP's buckets, FSDP's reduce-scatter,
gradient accumulation, ``retain_graph`` and ``torch.autograd.grad`` see what they would see without chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mst.ops.chunking import chunk_bounds, resolve_num_chunks
from lightning_mst.ops.context import AutocastState, RNGState, drop_autocast_copies, first_order_only
from lightning_mst.ops.gradients import GradientSums, check_graph, put_hooks_back
from lightning_mst.ops.last_linear import FindLastLinear, SkipLastLinear
from lightning_mst.ops.linear_reads import KeepRead, LinearReads, ReplayLinears
from lightning_mst.ops.region import Region, current_region
from lightning_mst.ops.rehearsal import walk

Block = Callable[..., Tensor | tuple[Tensor, ...]]

_HOW_TO_NAME = "token_wise(..., parameters=[...])"


@torch.compiler.disable
def token_wise(
    module_or_fn: Block,
    x: Tensor | Sequence[Tensor],
    *,
    num_chunks: int | None = None,
    chunk_tokens: int | None = None,
    parameters: Iterable[Tensor] | None = None,
    preserve_rng_state: bool = True,
    keep_single_chunk: bool = True,
    exactly: bool = False,
    reads: LinearReads | None = None,
    movable: bool = False,
) -> Any:
    """Runs a block that treats every token alike over mini-sequences, with the same output and the same gradients.

    The tokens of all sequences are cut into chunks whose lengths differ by at most one. Each chunk reaches the block
    with as many dimensions as the whole has: for ``x`` of shape (B, S, D) as (1, tokens, D).

    Args:
        module_or_fn: the block: a module, or a function of as many tensors as ``x`` holds. Must be a function of each
            token by itself (linear layers, activations, norms over the last dimension), and return one tensor or a
            tuple of tensors that keep the leading dimensions.
        x: (\\*lead, D), any floating dtype; or several tensors (\\*lead, ...) with the same leading dimensions, where
            ``lead`` is all but the last dimension of the first one.
        num_chunks: number M of mini-sequences. At most one per token is used.
        chunk_tokens: instead of ``num_chunks``: the most tokens in a mini-sequence.
        parameters: every tensor with a gradient that the block uses besides its inputs. Default: the module's
            parameters; a function that uses any must name them.
        preserve_rng_state: recompute each chunk with the random numbers of its first run, as dropout needs.
        keep_single_chunk: run a single chunk as it is, which keeps for backward whatever the block keeps, instead of
            recomputing it too.
        exactly: use all ``num_chunks`` chunks, some of them empty where there are fewer tokens. Ranks whose chunks
            communicate must have the same number of them.
        reads: which results of the block's linear layers its backward pass reads, from ``find_linear_reads``. These are
            kept, (tokens, D_out) each, and no linear layer is run again. Default: all but the last are run again.
        movable: whether a checkpointed layer that moves results of a fraction of its tokens to the host (``Region``)
            may do so with this block's, in whole mini-sequences and never the last one. They are then not computed
            again with the layer.

    Returns:
        What ``module_or_fn(x)`` returns: (\\*lead, D_out), or a tuple of such.

    Raises:
        ValueError: for a wrong number of chunks, inputs whose leading dimensions differ, or a block that changes the
            number of tokens.
        RuntimeError: if the block uses a parameter that ``parameters`` does not name: its gradient would be lost.
            Raised in backward at the latest.

    Source: arXiv 2407.15892, section 3.1; non-reentrant checkpointing with early stop, ``torch.utils.checkpoint``.
    """
    inputs = (x,) if isinstance(x, Tensor) else tuple(x)
    lead = _lead_shape(inputs)
    chunks = resolve_num_chunks(lead.numel(), num_chunks=num_chunks, chunk_tokens=chunk_tokens)
    if exactly and num_chunks is not None:
        chunks = num_chunks
    if chunks == 1 and keep_single_chunk:
        return module_or_fn(*inputs)
    if parameters is None:
        parameters = module_or_fn.parameters() if isinstance(module_or_fn, nn.Module) else ()
    weights = tuple(dict.fromkeys(parameters))
    run = _Run(module_or_fn, weights, lead, chunks, reads, movable)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *weights))):
        if torch.is_grad_enabled():
            run.check_no_graph(inputs)
        return run.forward(inputs)
    if preserve_rng_state:
        run.rng = RNGState(inputs[0].device)
    port = _SaveFirst.apply(run, *inputs, *weights)
    return _ComputeSecond.apply(run, port, *(t.detach() for t in inputs))


def _lead_shape(inputs: tuple[Tensor, ...]) -> torch.Size:
    if not inputs:
        raise ValueError("token_wise needs at least one input tensor; got none.")
    lead = inputs[0].shape[:-1]
    for index, tensor in enumerate(inputs):
        if tensor.shape[: len(lead)] != lead:
            raise ValueError(
                f"All inputs must have the leading (token) dimensions of the first, {tuple(lead)}; input {index} "
                f"has shape {tuple(tensor.shape)}."
            )
    return lead


class _Run:
    """One call of ``token_wise``: what its two nodes share."""

    def __init__(
        self,
        block: Block,
        weights: tuple[Tensor, ...],
        lead: torch.Size,
        num_chunks: int,
        reads: LinearReads | None = None,
        movable: bool = False,
    ) -> None:
        self.block = block
        self.weights = weights
        self.lead = lead
        self.bounds = chunk_bounds(lead.numel(), num_chunks)
        self.rng: RNGState | None = None
        self.autocast = AutocastState("cpu", False, torch.float32)
        self.returns_tuple = False
        self.last_linear: int | None = None
        self.reads = reads
        self._movable = movable
        # By position of the linear layer, its results (tokens, D_out): on their way from one node to the other.
        self.kept: dict[int, Tensor] = {}
        self.output_grads: tuple[Tensor, ...] = ()

    def rows(self, tensor: Tensor) -> Tensor:
        """(*lead, ...) -> (tokens, ...), the same memory."""
        return tensor.view(self.lead.numel(), *tensor.shape[len(self.lead) :])

    def piece(self, whole: Tensor, start: int, stop: int) -> Tensor:
        """(*lead, ...) -> (1, ..., 1, stop - start, ...), with as many dimensions as the whole."""
        rest = whole.shape[len(self.lead) :]
        return _tokens(whole, len(self.lead), start, stop).reshape(*(1,) * (len(self.lead) - 1), stop - start, *rest)

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """All chunks, without a graph, but those whose results the layer has on the host."""
        self.autocast = AutocastState.now(inputs[0].device)
        region = current_region() if self._movable else None
        moved = 0 if region is None else self._num_moved(region.fraction)
        recalls = moved > 0 and region is not None and region.is_recomputing
        whole = self._recall(region, moved) if region is not None and recalls else []
        drawn: RNGState | None = None
        with torch.no_grad():
            for start, stop in walk(self.bounds):
                if recalls and stop <= moved:
                    continue
                outputs = self._run_chunk(inputs, start, stop, is_first=not whole)
                if not whole:
                    rest = [t.shape[len(self.lead) :] for t in outputs]
                    # In its final shape at once: autograd forbids to write to a view that a node returned.
                    whole = [t.new_empty(*self.lead, *r) for t, r in zip(outputs, rest, strict=True)]
                for into, part in zip(whole, outputs, strict=True):
                    rows = self.rows(into)
                    rows[start:stop] = part.reshape(stop - start, *rows.shape[1:])
                if stop == moved and self.rng is not None and not self.rng.is_current():
                    drawn = RNGState(inputs[0].device)
        if self.autocast.enabled:
            drop_autocast_copies()
        if region is not None and not region.is_recomputing:
            region.movable_bytes += sum(t.nbytes for t in (*whole, *self.kept.values()))
        if moved and region is not None and not recalls:
            found = (self.returns_tuple, self.last_linear, self.reads, list(self.kept), drawn)
            region.keep([found, *(self.rows(t)[:moved] for t in whole), *(t[:moved] for t in self.kept.values())])
        return tuple(whole) if self.returns_tuple else whole[0]

    def _run_chunk(self, inputs: tuple[Tensor, ...], start: int, stop: int, *, is_first: bool) -> tuple[Tensor, ...]:
        find = FindLastLinear() if is_first and self.reads is None else nullcontext()
        keep = KeepRead(self.reads.read) if self.reads is not None else nullcontext()
        with find, keep:
            result = self.block(*(self.piece(t, start, stop) for t in inputs))
        if isinstance(find, FindLastLinear):
            self.last_linear = find.index(result)
        if isinstance(keep, KeepRead):
            self._keep(keep, start, stop)
        if is_first:
            self.returns_tuple = not isinstance(result, Tensor)
        outputs = tuple(result) if self.returns_tuple else (result,)
        self._check_outputs(outputs, stop - start)
        return outputs

    def _num_moved(self, fraction: float) -> int:
        """How many of the first tokens are kept on the host.

        Whole chunks, as random numbers are drawn for such; and not the last one, as those who called the block learn
        from it what else it says.
        """
        return max((stop for _, stop in self.bounds[:-1] if stop <= fraction * self.lead.numel()), default=0)

    def _recall(self, region: Region, moved: int) -> list[Tensor]:
        """What ``region.keep`` was given, in tensors of all tokens."""
        found, *parts = region.kept()
        self.returns_tuple, self.last_linear, self.reads, positions, drawn = found
        count = len(parts) - len(positions)
        whole = [part.new_empty(*self.lead, *part.shape[1:]) for part in parts[:count]]
        self.kept = {
            position: part.new_empty(self.lead.numel(), *part.shape[1:])
            for position, part in zip(positions, parts[count:], strict=True)
        }
        for into, part in zip([*map(self.rows, whole), *self.kept.values()], parts, strict=True):
            into[:moved] = part
        if drawn is not None:
            drawn.restore()
        return whole

    def _keep(self, keep: KeepRead, start: int, stop: int) -> None:
        """Puts the results of one chunk's linear layers to the other chunks'."""
        assert self.reads is not None
        has_other_rows = any(result.shape[:-1].numel() != stop - start for result in keep.kept.values())
        if tuple(keep.shapes) != self.reads.shapes or has_other_rows:
            # Not the block that was tried, as when another adapter has been switched on; or a layer's input is no
            # tokens, as in DoRA's norm of a weight. All of it runs again.
            self.reads = None
            self.kept.clear()
            return
        for position, result in keep.kept.items():
            if position not in self.kept:
                self.kept[position] = result.new_empty(self.lead.numel(), result.shape[-1])
            self.kept[position][start:stop] = result.reshape(stop - start, result.shape[-1])

    def _check_outputs(self, outputs: tuple[Tensor, ...], tokens: int) -> None:
        expected = (*(1,) * (len(self.lead) - 1), tokens)
        for tensor in outputs:
            if tuple(tensor.shape[: len(expected)]) != expected:
                raise ValueError(
                    f"The block is not token-wise: given {tokens} tokens with leading dimensions {expected}, it "
                    f"returned shape {tuple(tensor.shape)}. Every output must keep the leading dimensions."
                )

    def backward(
        self, inputs: tuple[Tensor, ...], need_inputs: Sequence[bool], need_weights: Sequence[bool]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """All chunks again, each with a graph of its own; returns the gradients of the inputs and of the weights."""
        output_grads, self.output_grads = self.output_grads, ()
        trained = [w for w, need in zip(self.weights, need_weights, strict=True) if need]
        input_grads: list[Tensor | None] = [None] * len(inputs)
        sums = GradientSums(trained, len(self.bounds), taken=[*inputs, *output_grads])
        rng = self.rng.replayed() if self.rng is not None else nullcontext()
        with rng, self.autocast.restored():
            for start, stop in walk(self.bounds):
                self._differentiate(start, stop, inputs, output_grads, need_inputs, input_grads, sums)
        self.kept = {}
        of_trained = iter(sums.take())
        return input_grads, [next(of_trained) if need else None for need in need_weights]

    def _differentiate(
        self,
        start: int,
        stop: int,
        inputs: tuple[Tensor, ...],
        output_grads: tuple[Tensor, ...],
        need_inputs: Sequence[bool],
        input_grads: list[Tensor | None],
        sums: GradientSums,
    ) -> None:
        """One chunk's gradients, added to the others'. A function of its own, so that all it made is gone after it."""
        parts = [
            self.piece(t, start, stop).detach().requires_grad_(need)
            for t, need in zip(inputs, need_inputs, strict=True)
        ]
        outputs = self._with_graph(parts, start, stop)
        if start == 0:
            check_graph(outputs, [*parts, *self.weights], _HOW_TO_NAME)
        pairs = [(y, self.piece(g, start, stop)) for y, g in zip(outputs, output_grads, strict=True) if y.requires_grad]
        if not pairs:
            return
        leaves = [index for index, need in enumerate(need_inputs) if need]
        grads = sums.differentiate(
            [y for y, _ in pairs], [parts[index] for index in leaves], [g.to(y.dtype) for y, g in pairs]
        )
        for index, grad in zip(leaves, grads, strict=True):
            if grad is not None:
                whole = input_grads[index]
                if whole is None:
                    whole = torch.zeros_like(inputs[index], memory_format=torch.contiguous_format)
                    input_grads[index] = whole
                rows = self.rows(whole)
                rows[start:stop] = grad.reshape(stop - start, *rows.shape[1:])

    def _with_graph(self, parts: list[Tensor], start: int, stop: int) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            # Module hooks such as FlopCounterMode's refuse a leaf under autograd.grad, so the block gets a view.
            if self.last_linear is not None:
                with SkipLastLinear(self.last_linear) as skip:
                    result = self.block(*(t.view_as(t) for t in parts))
                if result is skip.skipped:
                    return (result,)
            # Where the block did not end where it ended in the forward pass, all of it runs.
            with self._replay(parts[0], start, stop):
                result = self.block(*(t.view_as(t) for t in parts))
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def _replay(self, part: Tensor, start: int, stop: int) -> AbstractContextManager[object]:
        if self.reads is None:
            return nullcontext()
        lead = part.shape[: len(self.lead)]
        return ReplayLinears({index: rows[start:stop].view(*lead, -1) for index, rows in self.kept.items()})

    def check_no_graph(self, inputs: tuple[Tensor, ...]) -> None:
        """Raises if the block has a gradient after all, though nothing that it was said to use needs one."""
        parts = [self.piece(t, 0, 1) for t in inputs]
        with RNGState(inputs[0].device).replayed():
            result = self.block(*parts)
        outputs = (result,) if isinstance(result, Tensor) else tuple(result)
        check_graph(outputs, [*parts, *self.weights], _HOW_TO_NAME)


def _tokens(whole: Tensor, lead_dims: int, start: int, stop: int) -> Tensor:
    """(B, S, ...) -> (stop - start, ...): some of the B * S tokens. A copy only where a view can't be had."""
    if lead_dims == 2 and whole.shape[0] > 1 and not whole.is_contiguous():
        length = whole.shape[1]
        pieces = [
            whole[index, max(start - index * length, 0) : stop - index * length]
            for index in range(start // length, -(-stop // length))
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces or [whole[0, :0]])
    return whole.reshape(-1, *whole.shape[lead_dims:])[start:stop]


class _SaveFirst(torch.autograd.Function):
    """Saves the inputs, computes nothing; in backward does the work of both nodes."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> Tensor:
        ctx.run = run
        # The weights too, as any layer saves them: autograd then notices if one was changed before backward.
        ctx.save_for_backward(*tensors)
        return tensors[0].new_empty((), dtype=torch.float32)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        need = ctx.needs_input_grad[1:]
        count = len(need) - len(run.weights)
        saved = ctx.saved_tensors[:count]
        put_hooks_back(run.weights)
        inputs, weights = run.backward(saved, need[:count], need[count:])
        return (None, *inputs, *weights)


class _ComputeSecond(torch.autograd.Function):
    """Computes the chunks and saves nothing but what ``reads`` asks for; in backward hands all to the first node."""

    @staticmethod
    def forward(ctx: Any, run: _Run, port: Tensor, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        ctx.run = run
        outputs = run.forward(inputs)
        # As saved tensors and not beside them, so that checkpointing sees them.
        ctx.kept = list(run.kept)
        ctx.save_for_backward(*run.kept.values())
        run.kept = {}
        return outputs

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Beside the graph and not along it: an edge would demand that the output has the shape of the input.
        ctx.run.output_grads = grads
        ctx.run.kept = dict(zip(ctx.kept, ctx.saved_tensors, strict=True))
        return (None, grads[0].new_zeros((), dtype=torch.float32), *(None for _ in ctx.needs_input_grad[2:]))
