"""What an LM head is to the ops: a function from rows of hidden states to rows of logits, with its tensors named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_mst.ops.context import AutocastState


@dataclass(frozen=True, eq=False)
class LinearHead:
    """``linear(rows, weight, bias)``, whose gradients the ops form by themselves, in buffers that they reuse.

    Attributes:
        weight: (V, D).
        bias: (V,) or ``None``.
    """

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return F.linear(rows, self.weight, self.bias)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Every tensor of the head that may need a gradient."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.weight.shape[0]

    @property
    def is_plain(self) -> bool:
        """Whether single rows of the weight can be read, as they can't from a sharded or otherwise wrapped one."""
        return not is_traceable_wrapper_subclass(self.weight)

    def check(self, hidden: Tensor) -> None:
        """Raises ``ValueError`` if hidden states or the bias don't fit the weight."""
        if self.weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"hidden (..., D) and weight (V, D) must share D; got {tuple(hidden.shape)} and "
                f"{tuple(self.weight.shape)}."
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"bias must have shape ({self.weight.shape[0]},); got {tuple(self.bias.shape)}.")

    def logits_dtype(self, hidden: Tensor, autocast: AutocastState) -> torch.dtype:
        """The dtype of the logits of ``hidden`` under an autocast state."""
        return autocast.cast(hidden.new_empty(0)).dtype


@dataclass(frozen=True, eq=False)
class ModuleHead:
    """Any other head: with adapters, quantized, of several layers.

    A dropout inside it draws anew for every loss or reduction that is asked of its logits.

    Attributes:
        fn: a differentiable function of rows (n, D) that returns (n, V) and treats every row alike.
        parameters: every tensor that ``fn`` uses and that may need a gradient.
        vocab_size: V.
        dtype: of what ``fn`` returns, under the autocast state of the call that made the head.
    """

    fn: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    vocab_size: int
    dtype: torch.dtype

    def __call__(self, rows: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.fn(rows)

    def check(self, hidden: Tensor) -> None:
        """Raises ``ValueError`` for hidden states that are no rows; what else doesn't fit, ``fn`` will say."""
        if hidden.dim() < 1:
            raise ValueError(f"hidden must have shape (..., D); got {tuple(hidden.shape)}.")

    def logits_dtype(self, hidden: Tensor, autocast: AutocastState) -> torch.dtype:
        """The dtype of the logits."""
        return self.dtype


Head = LinearHead | ModuleHead
