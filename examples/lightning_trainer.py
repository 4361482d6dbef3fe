"""A Lightning program that anyone could have written, with one line added: ``callbacks=[MSTCallback(...)]``.

The real size, on a GPU: ``AutoModelForCausalLM.from_pretrained("my/model").train()``, text of 64K tokens per sequence,
``Trainer(precision="bf16-true")``, and ``MSTCallback()`` without numbers.
"""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_mst import MSTCallback

VOCAB, LENGTH = 1000, 2048


class LanguageModel(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
        )
        self.model = AutoModelForCausalLM.from_config(config).train()

    def training_step(self, ids: torch.Tensor, batch_idx: int) -> torch.Tensor:
        logits = self.model(input_ids=ids, use_cache=False).logits
        # Deferred logits: this line, unchanged, runs the LM head and the loss over mini-sequences.
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    torch.manual_seed(0)
    data = DataLoader(torch.randint(0, VOCAB, (4, LENGTH)))  # put your own text here
    trainer = Trainer(
        max_epochs=1,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        # "auto" would leave so short a sequence alone; verify=True checks the first batch's gradients.
        callbacks=[MSTCallback(mlp_chunks=4, lm_head_chunks=8, verify=True)],
    )
    trainer.fit(LanguageModel(), data)
    for name in ("train_loss", "peak_memory_gib"):
        print(f"{name}: {trainer.callback_metrics[name]:.3f}")
