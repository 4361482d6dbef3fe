"""Forward and backward pass of a whole Llama: unmodified, recomputed, with mini-sequences, and patched by others."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import transformers
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmarks.contest import UNMODIFIED, Contest, Values
from benchmarks.heads import auto_chunk_tokens
from benchmarks.measure import Step
from benchmarks.peers import deepspeed, liger
from benchmarks.sizes import Sizes
from lightning_mst import MSTConfig, apply_mst
from lightning_mst.configurations import conf_dir
from lightning_mst.models import from_config
from lightning_mst.ops.chunking import mlp_num_chunks
from lightning_mst.rewrite.costs import mlp_cost

# In fp64 attention takes memory and time quadratic in S.
LONGEST_REFERENCE = 2048


def contest(sizes: Sizes, length: int, dtype: torch.dtype, device: torch.device) -> list[Contest]:
    """All contestants share the weights; the settings are those of conf/mst."""
    with device:
        model = build_llama(sizes, length, dtype)
    ids = torch.randint(sizes.vocabulary, (1, length), device=device)
    leaves = list(model.parameters())
    matrices = [part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear)]

    def setting(name: str) -> Callable[[], Step]:
        return lambda: step_of(with_setting(model, name), ids)

    def patched_by_deepspeed() -> Step:
        twin = with_setting(model, "recompute")
        cost = mlp_cost(model.model.layers[0].mlp, sizes.hidden)
        hidden = torch.empty(length, sizes.hidden, dtype=dtype, device="meta")
        deepspeed.patch_llama(
            twin,
            ids,
            mlp_chunks=mlp_num_chunks("auto", num_tokens=length, hidden_size=sizes.hidden, cost=cost),
            head_chunks=-(-length // auto_chunk_tokens(hidden, model.lm_head.weight)),
        )
        return step_of(twin, ids)

    def patched_by_liger() -> Step:
        twin = with_setting(model, "recompute")
        liger.patch_llama(twin, ids)
        return step_of(twin, ids)

    def reference() -> Values:
        wide = copy.deepcopy(model).double()
        loss = step_of(wide, ids)()
        return {"loss": [loss], "dW": [weight.grad for weight in wide.parameters()]}

    return [
        Contest(
            block="Llama, forward and backward",
            length=length,
            leaves=leaves,
            forward_multiply_adds=length * sum(matrices),
            contestants={
                UNMODIFIED: lambda: step_of(with_same_weights(model), ids),
                "recompute": setting("recompute"),
                "ours, `paper`": setting("paper"),
                "ours, `auto`": setting("auto"),
            },
            peers={"DeepSpeed, recompute": patched_by_deepspeed, "Liger, recompute": patched_by_liger},
            values=lambda loss: {"loss": [loss], "dW": [weight.grad for weight in leaves]},
            expected=reference if length <= LONGEST_REFERENCE else None,
        )
    ]


def build_llama(sizes: Sizes, length: int, dtype: torch.dtype) -> nn.Module:
    heads = max(1, sizes.hidden // sizes.head_size)
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // (4 if heads >= 32 else 2)),
        max_position_embeddings=length,
    )
    return from_config(config, dtype=dtype)


def with_same_weights(model: nn.Module) -> nn.Module:
    """Another model to change, of the same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def with_setting(model: nn.Module, name: str) -> nn.Module:
    """Another model of the same weights under a setting of conf/mst."""
    twin = with_same_weights(model)
    apply_mst(twin, MSTConfig(**OmegaConf.to_container(OmegaConf.load(conf_dir() / "mst" / f"{name}.yaml"))))
    return twin


def step_of(model: nn.Module, ids: Tensor) -> Step:
    def step() -> Tensor:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return step
