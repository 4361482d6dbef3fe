"""Tracked bytes of real steps in a real Trainer, and the prediction for the same step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_mst import MSTConfig, OptimizerInBackward, apply_mst
from lightning_mst.memory.places import Places, blocks_of
from lightning_mst.memory.quantized import with_scales
from lightning_mst.memory.rehearsal import Step, fake_copy, new_fake_mode, rehearse
from lightning_mst.memory.tensor_bytes import TensorBytes

VOCAB = 500
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "off": MSTConfig(None, None, "none"),
    "recompute": MSTConfig(None, None, "all"),
    "paper": MSTConfig("paper", "paper", "all"),
    "auto": MSTConfig("auto", "auto", "all"),
    "M=3,5": MSTConfig(3, 5, "all"),
    "M=4 kept": MSTConfig(4, 4, "none"),
}


def causal_lm(family: str = "Llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    """A small model with random weights, with the attention that is linear in memory."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **overrides})
    attention = overrides.get("attn_implementation", "sdpa")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    return model.train()


def token_batch(batch_size: int, length: int) -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCAB, (batch_size, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens.clone()}


def causal_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, use_cache=False).loss


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)


def adamw_in_backward(model: nn.Module) -> torch.optim.Optimizer:
    return OptimizerInBackward(model.parameters(), torch.optim.AdamW, lr=1e-3, fused=True)


class Module(pl.LightningModule):
    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], make_optimizer: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.loss, self.make_optimizer = model, loss, make_optimizer

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = self.loss(self.model, batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.model)
        optimizer._step_supports_amp_scaling = False
        return optimizer

    def on_fit_start(self) -> None:
        for optimizer in self.trainer.optimizers:
            if hasattr(optimizer, "connect"):
                optimizer.connect(self.trainer)


class PlainModel(nn.Module):
    """A language model without transformers: its layers normalise, attend and feed forward."""

    def __init__(self, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(PlainBlock(width) for _ in range(layers))
        self.head = nn.Linear(width, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class PlainBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def plain_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"]).view(-1, VOCAB), batch["labels"].view(-1))


class Watch(pl.Callback):
    """Follows the bytes from the beginning of training, and reads the peak of one batch."""

    def __init__(self, batch: int, record: bool = False) -> None:
        self.batch, self.record = batch, record

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.places = Places(blocks_of(module))
        self.held = TensorBytes(places=self.places, vocab_size=VOCAB, record=self.record)
        self.held.count(with_scales(module.parameters()), "weights")
        self.held.count(module.buffers(), "buffers")
        self.followed = self.places.followed()
        self.followed.__enter__()
        self.held.__enter__()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        if index == self.batch:
            self.held.count((t for t in tree_leaves(batch) if isinstance(t, Tensor)), "buffers")
            states = [s for o in trainer.optimizers for s in tree_leaves(list(o.state.values()))]
            self.held.count((s for s in states if isinstance(s, Tensor)), "optimizer_states")
            self.held.count((p.grad for p in module.parameters() if p.grad is not None), "gradients")
            self.start = self.held.live
            self.held.forget_peaks()
            self.places.phase = "forward"

    def on_before_backward(self, *_: Any) -> None:
        self.places.phase = "backward"

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.places.phase = "optimizer"

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, i: int) -> None:
        if i == self.batch:
            self.total = self.held.peak
            self.peaks = dict(self.held.peaks)
            self.events = list(self.held.events)
            self.held.__exit__(None, None, None)
            self.followed.__exit__(None, None, None)
            self.held.freeze()


def real_step(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[..., Tensor],
    make_optimizer: Callable[[nn.Module], Any],
    config: MSTConfig,
    *,
    batch: int = 2,
    record: bool = False,
    **trainer: Any,
) -> Watch:
    """Trains, and watches one batch; the model is as it was before in the end."""
    watch = Watch(batch, record)
    trainer = {"devices": 1, **trainer}
    handle = None if config.asks_for_nothing else apply_mst(model, config)
    pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1, callbacks=[watch], **trainer,
    ).fit(Module(model, loss, make_optimizer), DataLoader(list(batches), batch_size=None))  # fmt: skip
    if handle is not None:
        handle.remove()
    for parameter in model.parameters():
        parameter.grad = None
    return watch


def rehearsed_step(
    model: nn.Module,
    batch: Any,
    loss: Callable[..., Tensor],
    make_optimizer: Callable[[nn.Module], Any],
    config: MSTConfig,
    *,
    record: bool = False,
    **step: Any,
) -> TensorBytes:
    """The same step on fake tensors."""
    fake = new_fake_mode()
    twin = fake_copy(model, fake)
    if not config.asks_for_nothing:
        apply_mst(twin, config)
    return rehearse(
        twin, Step(batch, loss, make_optimizer, on_gpu=False, **step), fake, vocab_size=VOCAB, record=record
    )
