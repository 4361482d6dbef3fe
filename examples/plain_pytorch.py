"""Mini-sequences without Lightning: any model, any loop.

The real size, on a GPU: a trained model in bf16, ids of 64K tokens, ``apply_mst(model)`` without numbers.
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_mst import apply_mst
from lightning_mst.memory import TensorBytes

VOCAB, LENGTH = 1000, 4096


def step(model: torch.nn.Module, ids: torch.Tensor) -> tuple[float, float]:
    """Loss and peak MiB of tensors, beyond the weights, of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    with TensorBytes([*model.parameters(), *model.buffers(), ids]) as memory:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    return loss.item(), memory.peak / 2**20


if __name__ == "__main__":
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.randint(0, VOCAB, (1, LENGTH))

    print("standard:       loss {:.6f}, peak {:.0f} MiB".format(*step(model, ids)))
    handle = apply_mst(model, mlp_chunks=8, lm_head_chunks=8)
    handle.print()
    print("mini-sequences: loss {:.6f}, peak {:.0f} MiB".format(*step(model, ids)))
    handle.update(checkpoint_layers="none")
    print("no checkpoints: loss {:.6f}, peak {:.0f} MiB".format(*step(model, ids)))
    handle.remove()
    print("as it was:      loss {:.6f}, peak {:.0f} MiB".format(*step(model, ids)))
