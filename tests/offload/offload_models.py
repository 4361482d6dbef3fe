"""Small models whose attention is one fused operator, and what a step of them gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mst.ops.kept_attention import is_fused_attention
from lightning_mst.rewrite.checkpointing import is_transformers_layer
from lightning_mst.rewrite.handle import MSTHandle
from lightning_mst.rewrite.offloading import Offload

VOCAB, LAYERS = 97, 3


class AttentionCalls(TorchDispatchMode):
    """Counts the calls of fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += is_fused_attention(func)
        return func(*args, **(kwargs or {}))


def _has_fused_groups() -> bool:
    """Whether the CPU's fused attention takes grouped queries, as it does not in torch 2.8."""
    query, key = torch.randn(1, 2, 4, 8), torch.randn(1, 1, 4, 8)
    with AttentionCalls() as calls:
        F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    return calls.count > 0


KV_HEADS, FEWEST_KV_HEADS = (2, 1) if _has_fused_groups() else (4, 4)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": KV_HEADS,
    "attn_implementation": "sdpa",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(family: str = "Llama", dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    return transformers.AutoModelForCausalLM.from_config(config).train().to(dtype)


def tokens(batch_size: int = 2, length: int = 33) -> Tensor:
    return torch.randint(3, VOCAB, (batch_size, length), generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, **inputs: Any) -> Tensor:
    ids = inputs.pop("input_ids", None)
    ids = tokens() if ids is None else ids
    # transformers' own loss is in fp32.
    logits = model(input_ids=ids, use_cache=False, **inputs).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor] = loss_of) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)  # for dropout
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any parameter's gradient, relative to the largest gradient."""
    assert got.keys() == expected.keys()
    assert got
    total = max(e.norm() for e in expected.values())
    return max(((got[n] - e).norm() / total).item() for n, e in expected.items())


def offload_of(handle: MSTHandle) -> Offload:
    """What the checkpointed layers of a rewritten model share."""
    layer = handle.layers[0]
    shared = layer._gradient_checkpointing_func if is_transformers_layer(layer) else layer._mst.forms["forward"]
    assert isinstance(shared, Offload)
    return shared


@contextmanager
def leaves_nothing(handle: MSTHandle) -> Iterator[None]:
    """Checks that no slab is in use after the body, and that none is left after the handle is removed."""
    offload = offload_of(handle)
    yield
    assert offload.memory.in_use == 0
    handle.remove()
    assert offload.memory.allocated == 0


class PlainBlock(nn.Module):
    """Hidden states by keyword, dropout, and attention by torch."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, *, scale: float, hidden: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm(hidden)).chunk(3, dim=-1))
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        hidden = hidden + self.dropout(self.out(attention)) * scale
        return hidden + self.mlp(hidden)


class PlainModel(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 32)
        self.blocks = nn.ModuleList(PlainBlock(32, dropout) for _ in range(LAYERS))
        self.head = nn.Linear(32, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(scale=0.5, hidden=x)
        return self.head(x)


def plain_loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(tokens())[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
