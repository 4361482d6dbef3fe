"""Data parallel training on long sequences: each device has a copy of the model and its share of the text.

As it stands it takes all GPUs there are, or two processes on a CPU. The real size:

* ``model = lightning_mst.models.from_pretrained("my/model")``, and a learning rate of 1e-5
* ``TextDataModule(source="jsonl", paths="documents.jsonl", tokenizer="my/model", sequence_length=65536)``
* ``MSTConfig()`` without numbers, and ``Trainer(precision="bf16-true")``

Where one device does not hold the model: ``sharded_trainer.py``.
"""

from functools import partial

import lightning.pytorch as pl
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_mst import MSTConfig
from lightning_mst.causal_lm import CausalLM
from lightning_mst.data import TextDataModule
from lightning_mst.strategies import MSTDDPStrategy

LENGTH = 1024
DEVICES = {"accelerator": "gpu", "devices": -1} if torch.cuda.is_available() else {"accelerator": "cpu", "devices": 2}

if __name__ == "__main__":
    pl.seed_everything(0, verbose=False)
    data = TextDataModule(max_documents=40, validation_fraction=0.2, vocab_size=512, sequence_length=LENGTH)
    data.prepare_data()
    data.setup()
    config = LlamaConfig(
        vocab_size=data.vocab_size, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config).train()
    module = CausalLM(
        model,
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        # A step is that of one batch with all devices' tokens, and of all batches that it accumulates.
        token_weighted=True,
    )
    trainer = Trainer(
        **DEVICES,
        # As a name: strategy="mst_ddp". Or Lightning's own, strategy="ddp", with callbacks=[MSTCallback()].
        strategy=MSTDDPStrategy(mst=MSTConfig(mlp_chunks=4, lm_head_chunks=4)),
        accumulate_grad_batches=2,
        max_steps=6,
        limit_val_batches=2,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
    )
    (before,) = trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    (after,) = trainer.validate(module, datamodule=data, verbose=False)

    with torch.no_grad():
        weights = torch.stack([parameter.double().sum() for parameter in model.parameters()]).sum()
    everywhere = trainer.strategy.all_gather(weights.to(trainer.strategy.root_device))
    if trainer.is_global_zero:
        print(f"devices: {trainer.world_size}, with equal weights: {bool((everywhere == everywhere[0]).all())}")
        print(f"held-out loss: {before['val_loss']:.4f} before, {after['val_loss']:.4f} after")
