"""One call of a block: which of its arguments are tokens, which of its results, and the chunks in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_mst.ops.chunking import MLP_MIN_TOKENS, BlockCost, mlp_num_chunks
from lightning_mst.ops.linear_reads import LinearReads
from lightning_mst.ops.token_wise import token_wise
from lightning_mst.rewrite.fsdp1 import weights_of
from lightning_mst.rewrite.handed_on import HandedOn
from lightning_mst.rewrite.pace import Pace
from lightning_mst.rewrite.routers import announce, overheard
from lightning_mst.rewrite.shapes import true_shape
from lightning_mst.rewrite.stand_in import units_inside


class Call:
    """The arguments with which a block was called.

    Args:
        name: the block's, for the message.
        args: positional arguments. Every tensor among the arguments has an entry per token: the first is x of shape
            (*lead, D), the others start with its leading dimensions.
        kwargs: arguments by name.

    Raises:
        TypeError: if there are no tensors, or they don't share their tokens.
    """

    def __init__(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        leaves, self._structure = tree_flatten((args, dict(kwargs)))
        self._norm: HandedOn | None = None
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, HandedOn):
                leaves[index] = self._take(leaf, is_first=not any(isinstance(t, Tensor) for t in leaves[:index]))
        self._slots = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._inputs: list[Tensor] = [leaves[index] for index in self._slots]
        # Without the tensors: what the chunks' function refers to lives until backward, unknown to checkpointing.
        self._others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        lead = self._inputs[0].shape[:-1] if self._inputs else ()
        if not self._inputs or any(t.shape[: len(lead)] != lead for t in self._inputs):
            shapes = ", ".join(str(tuple(t.shape)) for t in self._inputs) or "none"
            raise TypeError(
                f"{name} runs in mini-sequences as a function of tensors that share their tokens, but was called with "
                f"tensors of shapes {shapes}. Name the MLPs yourself (mlp_modules=...), or set mlp_chunks=None, or "
                "layer_chunks=None."
            )

    def _take(self, tensor: HandedOn, *, is_first: bool) -> Tensor:
        """The input of a norm that the block's first tensor is the output of; else the tensor itself."""
        if tensor.was_computed or not is_first:
            return tensor.real()
        tensor.check_source()
        self._norm = tensor
        return tensor.source

    @property
    def x(self) -> Tensor:
        """The first tensor, (*lead, D); the input of the norm before the block, where that is run with it."""
        return self._inputs[0]

    def num_chunks(self, setting: int | str, pace: Pace, sparsity: int = 1, cost: BlockCost | None = None) -> int:
        """M for a setting, the same on all ranks; see ``mlp_num_chunks``."""
        width = self.x.shape[-1]
        if isinstance(setting, int) and pace.shared:
            return setting * pace.factor
        num_tokens = pace.longest_of(self.x.numel() // max(1, width))
        chunks = mlp_num_chunks(setting, num_tokens=num_tokens, hidden_size=width, sparsity=sparsity, cost=cost)
        return max(1, min(chunks * pace.factor, num_tokens))

    def is_worth_recomputing(self, setting: int | str, *, in_checkpoint: bool) -> bool:
        """Whether ``"auto"`` rather recomputes a block that it does not split than keep its inside for backward.

        Args:
            setting: of the block.
            in_checkpoint: whether its layer is recomputed anyway.
        """
        if setting != "auto" or in_checkpoint or not torch.is_grad_enabled():
            return False
        return self.x.numel() // max(1, self.x.shape[-1]) >= MLP_MIN_TOKENS

    def run(
        self,
        finish: Callable[[Any], Any] | None = None,
        finish_parameters: Iterable[Tensor] = (),
        *,
        forward: Callable[..., Any],
        num_chunks: int,
        parts: Sequence[nn.Module],
        routers: Sequence[nn.Module] = (),
        reads: LinearReads | None = None,
        movable: bool = False,
    ) -> Any:
        """Runs all chunks, and tells what the routers said of all tokens to those who listen.

        Args:
            finish: a token-wise function of the block's result, to be run with it.
            finish_parameters: what it uses and may need a gradient.
            forward: the block.
            num_chunks: M.
            parts: the modules that it uses.
            routers: those of them that have listeners.
            reads: which results of its linear layers its backward pass reads; see ``token_wise``.
            movable: whether results may be kept on the host for the layer's recomputation; see ``token_wise``.

        Returns:
            What the block, or ``finish``, returns for the whole.
        """
        layout = _Layout(self.x.shape[:-1])
        slots, others, structure = self._slots, self._others, self._structure
        norm = None
        if self._norm is not None:
            norm, parts = self._norm.forward, [self._norm.norm, *parts]

        def piece(*tensors: Tensor) -> Any:
            leaves = list(others)
            if norm is not None:
                tensors = (norm(tensors[0]), *tensors[1:])
            for slot, tensor in zip(slots, tensors, strict=True):
                leaves[slot] = tensor
            args, kwargs = tree_unflatten(leaves, structure)
            with ExitStack() as stack:
                said = stack.enter_context(overheard(routers)) if routers else []
                result = forward(*args, **kwargs)
            if finish is not None:
                result = finish(result)
            return layout.pack([result, *said], tokens=tensors[0].shape[:-1].numel())

        for part in parts:
            if (reason := units_inside(part)) is not None:
                raise RuntimeError(f"{type(part).__name__} can't run in mini-sequences: {reason}.")
        parameters = [*(p for part in parts for p in weights_of(part)), *finish_parameters]
        if any(p.shape != true_shape(p) for p in parameters):
            raise RuntimeError(
                f"The weights of {type(parts[0]).__name__} are in pieces (DeepSpeed's ZeRO-3), but its mini-sequences "
                "need them whole. Call lightning_mst.rewrite.zero3.gather_whole_blocks(handle) after "
                "deepspeed.initialize, or leave both to Trainer(strategy='mst_deepspeed_stage_3')."
            )
        outputs = token_wise(
            piece,
            self._inputs,
            num_chunks=num_chunks,
            exactly=True,
            keep_single_chunk=False,
            parameters=parameters,
            # A norm, which reads what it is given.
            reads=reads.with_output_read() if reads and finish else reads,
            movable=movable,
        )
        result, *said = layout.unpack(outputs)
        for router, answer in zip(routers, said, strict=True):
            announce(router, answer, self.x)
        return result


class _Layout:
    """Takes nested results apart into tensors of tokens, and puts the whole sequence's together again.

    Experts' routers flatten (B, S) to B * S tokens; other values keep the leading dimensions.
    """

    def __init__(self, lead: Size) -> None:
        self._lead = lead
        self._shape: list[Any] = []

    def pack(self, values: list[Any], tokens: int) -> Any:
        """The tensors among the values, each with the leading dimensions (1, ..., 1, tokens)."""
        flat: list[Tensor] = []
        self._shape = [self._take(value, tokens, flat) for value in values]
        return flat[0] if len(flat) == 1 else tuple(flat)

    def _take(self, value: Any, tokens: int, flat: list[Tensor]) -> Any:
        if isinstance(value, tuple):
            return tuple(self._take(v, tokens, flat) for v in value)
        if not isinstance(value, Tensor):
            return None
        lead = (1,) * (len(self._lead) - 1) + (tokens,)
        if tuple(value.shape[: len(lead)]) == lead:
            flat.append(value)
            return "leading"
        if value.shape[:1] == (tokens,):
            flat.append(value.reshape(*lead, *value.shape[1:]))
            return "flat"
        return None

    def unpack(self, outputs: Any) -> list[Any]:
        """The values of the whole sequence; what was no tensor of tokens is ``None``."""
        flat = iter((outputs,) if isinstance(outputs, Tensor) else outputs)
        return [self._put(shape, flat) for shape in self._shape]

    def _put(self, shape: Any, flat: Iterator[Tensor]) -> Any:
        if isinstance(shape, tuple):
            return tuple(self._put(s, flat) for s in shape)
        if shape is None:
            return None
        tensor = next(flat)
        return tensor if shape == "leading" else tensor.reshape(-1, *tensor.shape[len(self._lead) :])
