"""Losses on deferred logits where weights are gathered only while their module runs (FSDP2), on two ranks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mst.rewrite.lm_head import rewrite_lm_head

RANKS, B, S, D, V = 2, 2, 6, 8, 32


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(D, V), nn.Linear(D, 2, bias=False), nn.Linear(2, V, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads = nn.Linear(D, D), nn.ModuleList([nn.Linear(D, V, bias=False), LowRank()])

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.trunk(x).tanh()
        return [head(hidden) for head in self.heads]


def loss_of(model: nn.Module, teacher: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Everything outside the model, as in a training step: one head, the other, both, and another model's."""
    first, second = model(x)
    with torch.no_grad():
        wanted, _ = teacher(x)
    chosen = labels.unsqueeze(-1)
    return (
        F.cross_entropy(first.flatten(0, 1), labels.flatten())
        + F.cross_entropy(second.flatten(0, 1), labels.flatten(), reduction="none").mean()
        - second.log_softmax(-1).gather(-1, chosen).mean()
        - first.gather(-1, chosen).mean()
        + (0.5 * first + 0.5 * second).logsumexp(-1).mean()
        + F.kl_div(first.log_softmax(-1), wanted.softmax(-1), reduction="batchmean")
        + second.topk(3).values.mean()
    )


def run_rank(rank: int, folder: str, own_units: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    model, teacher = TwoHeads().double(), TwoHeads().double()
    xs, labels = torch.randn(RANKS, B, S, D, dtype=torch.float64), torch.randint(V, (RANKS, B, S))
    plain = copy.deepcopy(model)
    losses = [loss_of(plain, teacher, xs[i], labels[i]) for i in range(RANKS)]
    torch.stack(losses).mean().backward()
    mesh = init_device_mesh("cpu", (RANKS,))
    for each in (model, teacher):
        for head in each.heads:
            rewrite_lm_head(head, 3)
            if own_units:
                fully_shard(head, mesh=mesh)
        fully_shard(each, mesh=mesh)
    loss = loss_of(model, teacher, xs[rank], labels[rank])
    torch.testing.assert_close(loss, losses[rank].detach(), rtol=1e-10, atol=1e-12)
    loss.backward()
    for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        grad = parameter.grad.full_tensor()
        assert torch.allclose(grad, expected.grad, rtol=1e-10, atol=1e-12), name
    dist.destroy_process_group()


@pytest.mark.parametrize("own_units", [True, False], ids=["heads in units of their own", "one unit"])
def test_losses_outside_the_model_are_exact_under_fsdp2(own_units: bool, tmp_path: Path) -> None:
    mp.spawn(run_rank, (str(tmp_path), own_units), nprocs=RANKS)
