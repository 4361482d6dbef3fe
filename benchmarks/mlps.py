"""A gated MLP, alone and with its residual in a checkpointed layer: unmodified, and in chunks of several makes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.contest import UNMODIFIED, Contest, Values
from benchmarks.measure import Step
from benchmarks.peers import deepspeed, liger
from benchmarks.sizes import Sizes
from lightning_mst.ops import token_wise
from lightning_mst.ops.chunking import mlp_num_chunks
from lightning_mst.rewrite.costs import mlp_cost

_REFERENCE_TOKENS = 1024
Block = Callable[[Tensor], Tensor]


class GatedMLP(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.up = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.down = nn.Linear(sizes.intermediate, sizes.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def contest(sizes: Sizes, length: int, dtype: torch.dtype, device: torch.device) -> list[Contest]:
    """All contestants, twice; those that take a number of chunks get that of ours."""
    mlp = GatedMLP(sizes).to(device=device, dtype=dtype)
    x = torch.randn(1, length, sizes.hidden, device=device, dtype=dtype).requires_grad_()
    incoming = torch.randn_like(x).requires_grad_(False)
    num_chunks = mlp_num_chunks("auto", num_tokens=length, hidden_size=sizes.hidden, cost=mlp_cost(mlp, sizes.hidden))

    def checkpointed(h: Tensor) -> Tensor:
        return torch.cat([checkpoint(mlp, part, use_reentrant=False) for part in h.chunk(num_chunks, 1)], 1)

    blocks: dict[str, Callable[[], Block]] = {
        UNMODIFIED: lambda: mlp,
        "per-chunk checkpoint": lambda: checkpointed,
        "ours": lambda: lambda h: token_wise(mlp, h, num_chunks=num_chunks),
    }
    peers: dict[str, Callable[[], Block]] = {
        "DeepSpeed": lambda: deepspeed.tiled_mlp(mlp, x, num_chunks),
        "Liger": lambda: liger.tiled_mlp(mlp, x, num_chunks),
    }

    def made(name: str, form: Callable[[Block], Block]) -> Contest:
        def steps(builders: dict[str, Callable[[], Block]]) -> dict[str, Callable[[], Step]]:
            return {kind: lambda build=build: _step(form(build()), x, incoming) for kind, build in builders.items()}

        contestants = steps(blocks)
        if form is _checkpointed_layer:
            contestants = {"no checkpointing": lambda: _step(_layer(mlp), x, incoming)} | contestants
        return Contest(
            block=name,
            length=length,
            leaves=[x, *mlp.parameters()],
            forward_multiply_adds=length * sum(weight.numel() for weight in mlp.parameters()),
            contestants=contestants,
            peers=steps(peers),
            values=lambda y: {"y": [y], "dX": [x.grad], "dW": [weight.grad for weight in mlp.parameters()]},
            expected=lambda: _reference(mlp, sizes, x, incoming, form),
        )

    return [made("MLP", lambda block: block), made("MLP, checkpointed layer", _checkpointed_layer)]


def _layer(block: Block) -> Block:
    return lambda h: h + block(h)


def _checkpointed_layer(block: Block) -> Block:
    return lambda h: checkpoint(_layer(block), h, use_reentrant=False)


def _step(block: Block, x: Tensor, incoming: Tensor) -> Step:
    def step() -> Tensor:
        y = block(x)
        y.backward(incoming)
        return y.detach()

    return step


def _reference(mlp: nn.Module, sizes: Sizes, x: Tensor, incoming: Tensor, form: Callable[[Block], Block]) -> Values:
    """In pieces, because all of the fp64 intermediates may not fit."""
    wide = GatedMLP(sizes).to(x.device).double()
    wide.load_state_dict(mlp.state_dict())
    rows = x.detach().double().requires_grad_()
    outputs = []
    for part, grad in zip(rows.split(_REFERENCE_TOKENS, 1), incoming.split(_REFERENCE_TOKENS, 1), strict=True):
        y = form(wide)(part)
        y.backward(grad.double())
        outputs.append(y.detach())
    return {"y": [torch.cat(outputs, 1)], "dX": [rows.grad], "dW": [weight.grad for weight in wide.parameters()]}
