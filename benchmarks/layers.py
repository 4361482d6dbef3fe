"""Forward and backward pass of a Llama whose layers are checkpointed: what more is done to them, in time and bytes.

The unmodified, checkpointed model is transformers' own checkpointing. Activations on the host cost a CPU a plain copy;
on a GPU the copies run beside the computation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.contest import UNMODIFIED, Contest, Values
from benchmarks.measure import Step
from benchmarks.sizes import Sizes
from benchmarks.steps import LONGEST_REFERENCE, build_llama, step_of, with_setting

SETTINGS = ("paper", "auto", "layer", "layer_offload", "layer_offload_attention")


def contest(sizes: Sizes, length: int, dtype: torch.dtype, device: torch.device) -> list[Contest]:
    """All contestants share the weights; the settings are those of conf/mst."""
    with device:
        model = build_llama(sizes, length, dtype)
    ids = torch.randint(sizes.vocabulary, (1, length), device=device)
    leaves = list(model.parameters())
    matrices = [part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear)]

    def setting(name: str) -> Callable[[], Step]:
        return lambda: step_of(with_setting(model, name), ids)

    def reference() -> Values:
        wide = copy.deepcopy(model).double()
        loss = step_of(wide, ids)()
        return {"loss": [loss], "dW": [weight.grad for weight in wide.parameters()]}

    return [
        Contest(
            block="Llama, checkpointed layers",
            length=length,
            leaves=leaves,
            forward_multiply_adds=length * sum(matrices),
            contestants={
                UNMODIFIED: setting("recompute"),
                **{f"ours, `{name}`": setting(name) for name in SETTINGS},
            },
            peers={},
            values=lambda loss: {"loss": [loss], "dW": [weight.grad for weight in leaves]},
            expected=reference if length <= LONGEST_REFERENCE else None,
        )
    ]
