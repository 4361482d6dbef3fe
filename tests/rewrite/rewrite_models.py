"""Small models of every supported family, and the comparison that all tests use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

VOCAB = 211
BASE = {
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "attn_implementation": "eager",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA2 = {"head_dim": 12, "query_pre_attn_scalar": 12, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0}
FAMILIES: dict[str, tuple[str, dict]] = {
    "Llama 2": ("Llama", {"num_key_value_heads": 4}),
    "Llama 3": ("Llama", {}),
    "Llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "Mistral": ("Mistral", {"sliding_window": 16}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 12}),
    "Gemma": ("Gemma", {"head_dim": 12}),
    "Gemma 2": ("Gemma2", GEMMA2),
    "Phi-3": ("Phi3", {}),
    "GPT-2": ("GPT2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}


def build(family: str, dtype: torch.dtype = torch.float64, **overrides: object) -> nn.Module:
    torch.manual_seed(0)
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**BASE, **options, **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    if family == "Gemma 2":  # its random logits are too small for the soft-cap to bend them
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(20)
    return model.to(dtype)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(width, inner), nn.Linear(inner, width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(F.gelu(self.up(x))))


class Block(nn.Module):
    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.ff = Attention(width), FeedForward(width, 4 * width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ff(self.norm2(x))


class PlainTransformer(nn.Module):
    """Written by hand: no transformers, its own names, its own loss."""

    def __init__(self, width: int = 48, layers: int = 3, *, tied: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.unembed = nn.Linear(width, VOCAB, bias=not tied)
        if tied:
            self.unembed.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.norm(x))


def plain_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[..., :-1, :].reshape(-1, VOCAB), labels[..., 1:].reshape(-1))


def hf_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return model(input_ids=ids, labels=labels, use_cache=False).loss


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of any parameter's gradient; also that the same ones exist."""
    assert got.keys() == expected.keys()
    return max(
        ((got[n].double() - e.double()).norm() / e.double().norm().clamp_min(1e-30)).item() for n, e in expected.items()
    )


def furthest(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """As ``distance``, but a gradient that is next to nothing, as a key's bias has, is held to the others' size."""
    assert got.keys() == expected.keys()
    total = max(e.norm() for e in expected.values())
    return max(((got[n] - e).norm() / e.norm().clamp_min(1e-4 * total)).item() for n, e in expected.items())


class MatmulCounter(TorchDispatchMode):
    """Counts the multiply-adds of all matrix products that have a dimension of one of the given widths."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.widths = set(widths)
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        if packet in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            sizes = (a.shape[0], a.shape[1], b.shape[1])
            if self.widths & set(sizes):
                self.total += sizes[0] * sizes[1] * sizes[2]
        return func(*args, **(kwargs or {}))


def multiply_adds(model: nn.Module, loss, *widths: int) -> int:
    """Of one forward and backward pass, in products with a dimension of one of the given widths."""
    with MatmulCounter(*widths) as counter:
        gradients(model, loss())
    return counter.total
