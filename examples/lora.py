"""LoRA on long sequences: bf16 weights that stay as they are, adapters that train, and the adapters alone on disk.

As it stands it adapts a small model with random weights to text of Python's standard library. The real size, on a GPU:

* ``base_model``: ``AutoModelForCausalLM.from_pretrained("my/model", dtype=torch.bfloat16).train()``
* ``TextDataModule(source="jsonl", paths="documents.jsonl", tokenizer="my/model", sequence_length=65536)``
* a learning rate of 2e-4, more steps, and ``MSTCallback()`` without numbers

Needs ``pip install 'lightning-mst[peft]'``. With 4-bit weights: ``qlora.py``.
"""

from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lightning_mst import MSTCallback
from lightning_mst.causal_lm import CausalLM
from lightning_mst.data import TextDataModule
from lightning_mst.models import count_parameters

LENGTH = 1024


def base_model(vocab_size: int) -> PreTrainedModel:
    """The frozen weights; the same at every call, as a trained model's are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()


if __name__ == "__main__":
    data = TextDataModule(max_documents=40, validation_fraction=0.2, vocab_size=512, sequence_length=LENGTH)
    data.prepare_data()
    data.setup()

    adapters = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(base_model(data.vocab_size), adapters)
    print(f"trained: {count_parameters(model, trainable=True):,} of {count_parameters(model):,} parameters")

    trainer = Trainer(
        max_steps=8,
        devices=1,
        precision="bf16-mixed",  # the adapters themselves are fp32
        limit_val_batches=2,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        # "auto" would leave so short a sequence alone; verify=True checks the first batch's gradients.
        callbacks=[MSTCallback(mlp_chunks=4, lm_head_chunks=4, verify=True)],
    )
    module = CausalLM(model, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    (before,) = trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    (after,) = trainer.validate(module, datamodule=data, verbose=False)
    print(f"held-out loss: {before['val_loss']:.4f} before, {after['val_loss']:.4f} after")

    model.save_pretrained("adapter")
    size = sum(path.stat().st_size for path in Path("adapter").glob("*.safetensors"))
    print(f"adapter: {size / 2**10:.0f} KiB on disk")
    loaded = PeftModel.from_pretrained(base_model(data.vocab_size), "adapter")
    (again,) = trainer.validate(CausalLM(loaded), datamodule=data, verbose=False)
    print(f"held-out loss: {again['val_loss']:.4f} of the saved adapter")
