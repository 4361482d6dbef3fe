"""What the probe accepts, what it refuses, and that it leaves no trace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mst.rewrite.probe import probe
from lightning_mst.rewrite.stand_in import stand_in


class MLP(nn.Module):
    def __init__(self, width: int = 16, inner: int = 32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(F.gelu(self.up(x))))

    def between(self, x: Tensor) -> Tensor:
        return x


class Faint(MLP):
    """Lets a token see the one before it so faintly that fp32 rounding hides it at this size of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.full((32,), 1e-7))

    def between(self, x: Tensor) -> Tensor:
        return x + self.mix * x.roll(1, dims=-2)


class Positions(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 32)

    def between(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(x.shape[-2], device=x.device))


class Remembering(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += x.shape[-2]
        return x


class Normalising(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(32)

    def between(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Tuples(MLP):
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, None, Tensor]:
        y = super().forward(x)
        return y + residual, None, y.sum(-1)


class Averaging(MLP):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x.mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("module_class", [MLP, Tuples])
def test_blocks_that_treat_every_token_alike_pass(module_class, dtype):
    verdict = probe(module_class().to(dtype), [16])
    assert verdict.reason is None
    assert verdict.width == 16
    assert verdict.outputs == (3 if module_class is Tuples else 0)


@pytest.mark.parametrize(
    ("module_class", "reason"),
    [
        (Faint, "mixes tokens"),
        (Positions, "mixes tokens"),
        (Normalising, "batch normalisation"),
        (Remembering, "changes its buffer seen"),
        (Averaging, "no entry per token"),
    ],
)
def test_others_are_refused_with_the_reason(module_class, reason):
    assert reason in probe(module_class(), [16]).reason


def test_the_width_of_a_block_and_its_mirror_image_is_found_by_trying():
    assert probe(MLP(16, 32), [32, 16]).width == 16


@pytest.mark.parametrize("module_class", [MLP, Faint])
def test_a_block_on_the_meta_device_is_judged_by_a_stand_in(module_class):
    with torch.device("meta"):
        module = module_class()
    assert (probe(module, [16]).reason is None) == (module_class is MLP)


def test_a_stand_in_takes_no_memory_and_shares_nothing_with_the_module():
    with torch.device("meta"):
        module = MLP(16384, 65536)
    twin = stand_in(module)
    assert twin.up.weight.shape == (65536, 16384)
    assert sum(p.untyped_storage().nbytes() for p in twin.parameters()) < 2**20
    assert twin(torch.ones(1, 1, 16384)).shape == (1, 1, 16384)
    assert module.up.weight.is_meta


def test_a_probe_leaves_hooks_buffers_modes_and_random_numbers_alone():
    module = Remembering()
    calls: list[nn.Module] = []
    module.up.register_forward_hook(lambda m, _a, _o: calls.append(m))
    module.down.register_forward_pre_hook(lambda m, _a: calls.append(m))
    module.down.eval()
    state = torch.get_rng_state()
    probe(module, [16])
    assert not calls
    assert module.seen == 0
    assert module.up.training
    assert not module.down.training
    assert torch.equal(torch.get_rng_state(), state)
    module(torch.randn(1, 3, 16))
    assert len(calls) == 2
