"""Attention as the flash kernel of GPUs holds it in memory: linear in the length, whatever this machine would run.

Source: arXiv 2307.08691 (FlashAttention-2). Forward keeps the output and one fp32 log-sum-exp per head and token;
backward needs, beside the gradients, an fp32 sum of the queries' gradients and one more fp32 number per head and token,
and with grouped queries a key and value gradient for every query head before they are added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mst.ops.context import AutocastState

NAME = "lightning_mst_flash"
"""Under which transformers' models find it."""


class FlashAttention:
    """Attention that takes the memory of the flash kernel. Only shapes and dtypes of its results mean anything.

    Args:
        kernel_workspace: count what the kernel of a GPU allocates for itself in the backward pass. Without it, it is a
            CPU's.
    """

    def __init__(self, *, kernel_workspace: bool) -> None:
        self._kernel_workspace = kernel_workspace

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of (B, H, S, D), (B, H_kv, S_kv, D) and (B, H_kv, S_kv, D_v): (B, H, S, D_v)."""
        autocast = AutocastState.now(query.device)
        query, key, value = (autocast.cast(t) for t in (query, key, value))
        with autocast.disabled():
            return _Flash.apply(self._kernel_workspace, query, key, value)

    @contextmanager
    def used_by(self, model: nn.Module) -> Iterator[None]:
        """Lets a model use it while the body runs: a transformers model whatever attention it is set to."""

        def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
            return self(query, key, value)

        # Not by a mode for functions: none is active in what is recomputed in the backward pass.
        before, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attention
        try:
            with self._in_transformers(model):
                yield
        finally:
            F.scaled_dot_product_attention = before

    @contextmanager
    def _in_transformers(self, model: nn.Module) -> Iterator[None]:
        configs = configs_of(model)
        if not configs:
            yield
            return
        from transformers import AttentionInterface

        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
        ) -> tuple[Tensor, None]:
            return self(query, key, value).transpose(1, 2).contiguous(), None

        before = [config._attn_implementation for config in configs]
        AttentionInterface.register(NAME, attention)
        with ExitStack() as stack:
            for config, name in zip(configs, before, strict=True):
                config._attn_implementation = NAME
                stack.callback(setattr, config, "_attn_implementation", name)
            yield


def configs_of(model: nn.Module) -> list[Any]:
    """The configurations that say which attention a transformers model uses."""
    found = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")}
    return list(found.values())


def _results(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The output, (B, H, S, D_v), and the log-sum-exp, (B, H, S), without values."""
    # As the queries lie in memory; transformers copies what is not (B, S, H, D) then.
    out = torch.empty_like(query)
    if value.shape[-1] != query.shape[-1]:
        out = out.new_empty(*query.shape[:-1], value.shape[-1])
    return out, query.new_empty(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))


def _gradients(query: Tensor, key: Tensor, value: Tensor, by_tokens: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries, keys and values, without values, (B, H, S, D) each.

    Args:
        query: as in the forward pass.
        key: as in the forward pass.
        value: as in the forward pass.
        by_tokens: leave them as (B, S, H, D) in memory, whatever the inputs are.
    """
    if by_tokens:
        dq, dk, dv = (t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (query, key, value))
    else:
        dq, dk, dv = (torch.empty_like(t) for t in (query, key, value))
    return dq, dk, dv


# One operator each, as the kernels are: who keeps the results of attention, or counts what it computes, looks for them.
_flash_attention = torch.library.custom_op(
    "lightning_mst::flash_attention",
    _results,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor)",
)
_flash_attention.register_fake(_results)
_flash_attention_backward = torch.library.custom_op(
    "lightning_mst::flash_attention_backward",
    _gradients,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, bool by_tokens) -> (Tensor, Tensor, Tensor)",
)
_flash_attention_backward.register_fake(_gradients)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, workspace: bool, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, log_sum_exp = _flash_attention(query, key, value)
        ctx.workspace = workspace
        ctx.save_for_backward(query, key, value, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, log_sum_exp = ctx.saved_tensors
        # A CPU's kernel leaves (B, S, H, D) whatever it was given.
        grads = _flash_attention_backward(query, key, value, not ctx.workspace)
        if not ctx.workspace:
            return None, *grads
        held = [torch.empty_like(query, dtype=torch.float32), torch.empty_like(log_sum_exp)]
        if key.shape[1] != query.shape[1]:
            groups = query.shape[1] // key.shape[1]
            held += [t.new_empty(t.shape[0], t.shape[1] * groups, *t.shape[2:]) for t in (key, value)]
        del held
        return None, *grads
