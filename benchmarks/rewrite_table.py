"""``python -m benchmarks.rewrite_table FAMILY``: the rewrite table of a small model of a family of transformers."""

from __future__ import annotations

import sys

import torch
import transformers

from lightning_mst import apply_mst

_SIZES = {
    "llama": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4},
    "gemma2": {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16,
    },
    "jamba": {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts": 4, "use_mamba_kernels": False, "pad_token_id": 0,
    },
    "ctrl": {"n_embd": 64, "dff": 160, "n_layer": 4, "n_head": 4},
}  # fmt: skip


def main() -> None:
    family = sys.argv[1]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, vocab_size=1000, **_SIZES[family])
    apply_mst(transformers.AutoModelForCausalLM.from_config(config)).print()


if __name__ == "__main__":
    main()
