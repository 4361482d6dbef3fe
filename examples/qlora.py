"""QLoRA on long sequences: 4-bit weights that stay as they are, adapters that train, mini-sequences for the rest.

The real size, on a GPU: ``AutoModelForCausalLM.from_pretrained("my/model", dtype=torch.bfloat16).train()``, text of 64K
tokens per sequence, a learning rate of 2e-4, and ``MSTCallback()`` without numbers. ``lora.py`` saves its adapters.

Needs ``pip install 'lightning-mst[quantized]'``.
"""

import bitsandbytes as bnb
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_mst import MSTCallback
from lightning_mst.causal_lm import CausalLM
from lightning_mst.models import count_parameters
from lightning_mst.quantization import quantize

VOCAB, LENGTH = 1000, 1024

if __name__ == "__main__":
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4
    )
    # Random weights, so that the example runs anywhere.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    before = model.get_memory_footprint()
    quantize(model, "nf4")
    print(f"weights: {before / 2**20:.1f} MiB in bf16, {model.get_memory_footprint() / 2**20:.1f} MiB in 4 bits")
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    print(f"trained: {count_parameters(model, trainable=True):,} of {count_parameters(model):,} parameters")

    ids = torch.arange(LENGTH).remainder(17).unsqueeze(0)  # put your own text here
    trainer = Trainer(
        max_epochs=1,
        precision="bf16-mixed",
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        # "auto" would leave so short a sequence alone; verify=True checks the first batch's gradients.
        callbacks=[MSTCallback(mlp_chunks=4, lm_head_chunks=8, verify=True)],
    )
    module = CausalLM(model, optimizer=lambda parameters: bnb.optim.AdamW8bit(parameters, lr=1e-2))
    trainer.fit(module, DataLoader([{"input_ids": ids, "labels": ids}] * 8, batch_size=None))
    for name in ("train_loss", "peak_memory_gib"):
        print(f"{name}: {trainer.callback_metrics[name]:.3f}")
