"""A model of one's own: plain PyTorch, rewritten without a line about mini-sequences in it.

The MLPs, the LM head and the layers are found by their structure. The loss and torchmetrics' perplexity are written on
the logits as always; both run over mini-sequences, so that the logits of a whole sequence are never held.

As it stands it trains on text of Python's standard library. The real size, on a GPU:

* ``Decoder(vocab, LENGTH, width=2048, layers=16, heads=16)``, or your own model, and ``LENGTH = 65536``
* ``TextDataModule(source="jsonl", paths="documents.jsonl", vocab_size=32000, sequence_length=LENGTH)``
* ``Trainer(precision="bf16-true")``, more steps, and ``MSTCallback()`` without numbers (``verify=True`` once, at a
  length that the model can train without mini-sequences)
"""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torchmetrics.text import Perplexity

from lightning_mst import MSTCallback
from lightning_mst.data import TextDataModule

LENGTH = 1024


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, S, D / H)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # linear in memory
        return self.out(mixed.transpose(1, 2).flatten(-2))  # (B, S, D)


class MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = MLP(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    def __init__(self, vocab: int, length: int, width: int = 128, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.ModuleList(Layer(width, heads, 4 * width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))  # (B, S, V)


class LanguageModel(LightningModule):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.model = Decoder(vocab, LENGTH)
        self.perplexity = Perplexity()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        ids = batch["input_ids"]
        loss = F.cross_entropy(self.model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        ids = batch["input_ids"]
        self.perplexity(self.model(ids)[:, :-1], ids[:, 1:])
        self.log("perplexity", self.perplexity)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


if __name__ == "__main__":
    seed_everything(0, verbose=False)
    data = TextDataModule(max_documents=40, validation_fraction=0.2, vocab_size=512, sequence_length=LENGTH)
    data.prepare_data()
    data.setup()

    trainer = Trainer(
        max_steps=12,
        devices=1,
        limit_val_batches=4,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        # "auto" would leave so short a sequence alone; verify=True checks the first batch's gradients.
        callbacks=[MSTCallback(mlp_chunks=4, lm_head_chunks=4, verify=True)],
    )
    module = LanguageModel(data.vocab_size)
    (before,) = trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    (after,) = trainer.validate(module, datamodule=data, verbose=False)
    print(f"held-out perplexity: {before['perplexity']:.2f} before, {after['perplexity']:.2f} after")
