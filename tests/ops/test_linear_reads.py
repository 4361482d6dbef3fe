"""Which projections' results a backward pass reads, and what is done with the others'."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mst.ops.linear_reads import find_linear_reads
from lightning_mst.ops.token_wise import token_wise


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)


class Rotated(Projections):
    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        return self.first(x) * angle.cos() + self.second(x).flip(-1) * angle.sin()


class Normed(Projections):
    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        return F.rms_norm(self.first(x), (8,)) * angle.cos() + self.second(x)


class Gated(Projections):
    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        return self.first(x) * self.second(x)


class InARow(Projections):
    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        return self.second(self.first(x))


class Clipped(Projections):
    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        return self.first(x).clamp_(-0.1, 0.1) + self.second(x)


class Chosen(Projections):
    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        # Only a mask is kept, of which values with the same signs say the same.
        return torch.where(self.first(x) > 0, self.second(x), x)


class Transposed(Projections):
    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        rows = torch.addmm(self.first.bias, x.reshape(-1, 8), self.first.weight)
        return rows.view(x.shape) * angle.cos() + self.second(x)


class CountMatmuls(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


BLOCKS = {
    Rotated: (set(), {0, 1}),
    Normed: ({0}, {0, 1}),
    Gated: ({0, 1}, {0, 1}),
    InARow: ({0}, {0, 1}),
    Clipped: ({0}, {0, 1}),
    Chosen: ({0}, {0, 1}),
    Transposed: (set(), {0, 1}),
}
blocks = pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True), torch.randn(2, 11, 8, dtype=torch.float64)


@blocks
def test_what_is_read_and_what_is_shown_is_found_by_trial(block):
    reads = find_linear_reads(block().double(), inputs())
    assert (len(reads.shapes), reads.read, reads.shown) == (2, *BLOCKS[block])
    assert reads.with_output_read().read == reads.read | reads.shown


@blocks
@pytest.mark.parametrize("num_chunks", [2, 5])
def test_gradients_are_exact_and_no_projection_runs_again(block, num_chunks):
    module, (x, angle) = block().double(), inputs()
    expected = torch.autograd.grad(module(x, angle).square().sum(), [x, *module.parameters()], allow_unused=True)
    reads = find_linear_reads(module, (x, angle))
    output = token_wise(module, (x, angle), num_chunks=num_chunks, reads=reads)
    with CountMatmuls() as counter:
        got = torch.autograd.grad(output.square().sum(), [x, *module.parameters()], allow_unused=True)
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    backward_products = sum(2 for e in expected[1::2] if e is not None)
    assert counter.calls <= num_chunks * backward_products


def test_a_block_that_goes_through_other_layers_than_the_one_tried_is_still_exact():
    module, (x, angle) = Rotated().double(), inputs()
    reads = find_linear_reads(module, (x, angle))

    def other(x: Tensor, angle: Tensor) -> Tensor:
        return module(F.silu(F.linear(x, module.first.weight)), angle)

    expected = torch.autograd.grad(other(x, angle).square().sum(), [x, *module.parameters()])
    output = token_wise(other, (x, angle), num_chunks=3, reads=reads, parameters=module.parameters())
    got = torch.autograd.grad(output.square().sum(), [x, *module.parameters()])
    for one, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-10, atol=1e-12)
