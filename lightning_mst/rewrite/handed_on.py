"""A norm that leaves its work to the block that comes next.

A layer calls ``mlp(norm(x))``. The norm answers with a tensor that has computed nothing; the MLP in mini-sequence form
finds the norm and ``x`` in it, and runs both over one mini-sequence after the other. So neither the norm's output nor
its fp32 copies ever exist for the whole sequence, and the layer's own ``forward`` stays as it is. Whoever else looks at
the tensor gets the real output, computed in mini-sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_mst.ops.deferred_tensor import DeferredTensor, without_values
from lightning_mst.ops.metadata import needs_no_values, version_of
from lightning_mst.ops.token_wise import token_wise
from lightning_mst.rewrite.fsdp1 import weights_of

T = TypeVar("T")
Forward = Callable[[Tensor], Tensor]


class HandedOn(DeferredTensor):
    """The output of a norm that has not run.

    Attributes:
        norm: the norm.
        forward: what it computes, from (..., D) to (..., D).
        source: its input, (*lead, D).
    """

    norm: nn.Module
    forward: Forward
    source: Tensor
    _num_chunks: int
    _real: Tensor | None
    _has_graph: bool
    _version_of_source: int

    @staticmethod
    def __new__(
        cls, norm: nn.Module, forward: Forward, source: Tensor, *, num_chunks: int, dtype: torch.dtype
    ) -> HandedOn:
        """Makes the tensor.

        Args:
            norm: the norm.
            forward: what it computes.
            source: its input.
            num_chunks: M, where nothing else runs it.
            dtype: of its output.
        """
        result = torch.Tensor._make_wrapper_subclass(cls, source.shape, dtype=dtype, device=source.device)
        result.norm, result.forward, result.source = norm, forward, source
        result._num_chunks, result._real, result._has_graph = num_chunks, None, False
        result._version_of_source = version_of(source)
        return result

    @property
    def was_computed(self) -> bool:
        """Whether somebody has asked for the real output."""
        return self._real is not None

    def real(self) -> Tensor:
        """The norm's output, of all tokens; computed at the first call, and at the first with a graph, and kept."""
        if self._real is None or (torch.is_grad_enabled() and not self._has_graph):
            self.check_source()
            self._has_graph = torch.is_grad_enabled()
            self._real = token_wise(
                self.forward,
                self.source,
                num_chunks=self._num_chunks,
                exactly=True,
                keep_single_chunk=False,
                parameters=weights_of(self.norm),
            )
        return self._real

    def check_source(self) -> None:
        """Raises if the norm's input is not what it was when the norm was called."""
        if version_of(self.source) != self._version_of_source:
            raise RuntimeError(
                f"The input of {type(self.norm).__name__} was changed in place before the block that applies the norm "
                "in mini-sequences ran. Change a copy, or set layer_chunks=None."
            )

    @classmethod
    def respond(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gives anything but questions about shapes the real output."""
        if needs_no_values(func):
            return without_values(func, args, kwargs)
        args, kwargs = real((args, kwargs))
        return func(*args, **kwargs)


def real(values: T) -> T:
    """Nested arguments with the outputs of norms that have not run computed.

    A block that does not apply the norm itself gets these: a function of autograd's own takes what it is given for a
    tensor without a graph.
    """
    result: T = tree_map_only(HandedOn, lambda t: t.real(), values)
    return result
