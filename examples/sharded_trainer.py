"""A Lightning program on two devices (here: processes on a CPU), its model sharded by FSDP2 without a line about it.

The real size: ``Trainer(accelerator="gpu", devices=8, precision="bf16-true")``, a model from
``lightning_mst.models.from_pretrained("my/model")``, text of 64K tokens per sequence, and ``MSTConfig()`` without
numbers.
"""

from functools import partial

import lightning.pytorch as pl
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_mst import MSTConfig, OptimizerInBackward
from lightning_mst.causal_lm import CausalLM
from lightning_mst.strategies import MSTModelParallelStrategy

VOCAB, LENGTH, IGNORED = 1000, 1024, -100

if __name__ == "__main__":
    pl.seed_everything(0, verbose=False)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config).train()
    rows = []  # put your own text here; of these, each has another number of labels that count
    for start in range(0, 800, 100):
        ids = torch.randint(0, VOCAB, (LENGTH,))
        rows.append({"input_ids": ids, "labels": torch.where(torch.arange(LENGTH) < start, IGNORED, ids)})
    module = CausalLM(
        model,
        # Each weight is stepped, and its gradient freed, during the backward pass.
        optimizer=partial(OptimizerInBackward, optimizer=torch.optim.AdamW, lr=1e-3),
        # A step is that of one batch with both devices' tokens.
        token_weighted=True,
    )
    trainer = Trainer(
        accelerator="cpu",  # "gpu"
        devices=2,
        # As a name: strategy="mst_model_parallel".
        strategy=MSTModelParallelStrategy(mst=MSTConfig(mlp_chunks=4, lm_head_chunks=8)),
        max_epochs=1,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(rows))
    if trainer.is_global_zero:
        for name in ("train_loss", "peak_memory_gib"):
            print(f"{name}: {trainer.callback_metrics[name]:.3f}")
