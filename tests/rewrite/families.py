"""Every causal language model of the installed transformers, as small as it can be built."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 211
MOST_PARAMETERS = 30_000_000
Result = TypeVar("Result")

# Names that mean nothing to a family are ignored by its configuration, so one set of sizes builds most of them.
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 2, "head_dim": 12,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "is_decoder": True,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 40, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    # The grouped kernel has no fp64 form; the loop over experts has.
    "experts_implementation": "eager", "attn_implementation": "eager",
    # low-rank attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    # state space models
    "mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1,
    "use_mamba_kernels": False,
    # encoder-decoders
    "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 112, "decoder_ffn_dim": 112, "d_model": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "ffn_dim": 112, "ffn_hidden_size": 112,
    # Random numbers would be drawn in another order.
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "dropout": 0.0, "activation_dropout": 0.0,
    "classifier_dropout": 0.0, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0, "layerdrop": 0.0,
    "decoder_layerdrop": 0.0, "encoder_layerdrop": 0.0,
}  # fmt: skip

MLA = {"head_dim": None, "num_key_value_heads": 4}
# What a family needs beside SMALL; None takes a name out of it.
SPECIAL: dict[str, dict] = {
    "axk1": MLA,
    "axk2": MLA,
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "deepseek_v4": {"num_hash_layers": 0},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon": {"head_dim": None},
    "falcon_h1": {"mamba_d_ssm": 96},
    "flint": {"num_hidden_layers": 4},
    "gemma2": {"query_pre_attn_scalar": 12, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"], "laurel_rank": 8,
        "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": MLA,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {**MLA, "head_dim": 8, "num_layers": 2, "expert_ffn_hidden_size": 32},
    "mamba2": {"num_heads": 8, "head_dim": 12, "state_size": 8, "n_groups": 1},
    "minicpm3": MLA,
    "stablelm": {"partial_rotary_factor": 0.5},
    "xlstm": {"v_head_dim": None, "num_heads": 4, "head_dim": None, "embedding_dim": 48},
    "youtu": MLA,
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "layer_types": ["mamba", "mamba", "hybrid"], "hybrid_layer_ids": [2]},
}  # fmt: skip

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


class CannotBuild(Exception):
    """A family has no small model that learns to predict the next of a row of tokens, with the reason."""


def build(family: str, **overrides: object) -> nn.Module:
    """A small model of a family, in fp32 and in train mode."""
    options = {k: v for k, v in {**SMALL, **SPECIAL.get(family, {}), **overrides}.items() if v is not None}
    try:
        config = CONFIG_MAPPING[family](**options)
        if getattr(config, "output_router_logits", None) is not None:
            config.output_router_logits = True
            config.router_aux_loss_coef = 0.5
        class_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
        model_class = getattr(transformers, class_name if isinstance(class_name, str) else class_name[0])
        with torch.device("meta"):
            size = sum(p.numel() for p in model_class(config).parameters())
        if size > MOST_PARAMETERS:
            raise CannotBuild(f"its smallest model has {size:,} parameters")
        torch.manual_seed(0)
        return model_class(config).train()
    except CannotBuild:
        raise
    except Exception as error:
        raise CannotBuild(f"{type(error).__name__}: {error}") from error


def build_and_train(
    family: str, step: Callable[[nn.Module], Result], *, router_losses: bool = True
) -> tuple[nn.Module, Result]:
    """A small model and what a training step of it gives.

    In fp64, or in fp32 if the family's code has no fp64 form; without the losses over routers where a release of
    transformers can't compute them, unless they are asked for.
    """
    reason: Exception | None = None
    for dtype, losses in ((torch.float64, True), (torch.float32, True), (torch.float64, False)):
        if not losses and router_losses:
            break
        model = build(family).to(dtype)
        if not losses:
            model.config.output_router_logits = False
        try:
            return model, step(model)
        except Exception as error:
            reason = reason or error
    raise CannotBuild(f"it does not train as it is: {type(reason).__name__}: {reason}")
