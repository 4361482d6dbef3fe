"""Two projections with pointwise work between them, run over mini-sequences without being a module."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mst.memory.tensor_bytes import TensorBytes
from lightning_mst.ops.deferred_output import DeferredOutput, defer_output
from lightning_mst.ops.token_wise import token_wise


def gelu_of_gpt(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": nn.SiLU(),
    "relu, in place": nn.ReLU(inplace=True),
    "gelu by tanh": gelu_of_gpt,
    "squared relu": lambda x: torch.square(F.relu(x)),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "nothing": lambda x: x,
    "another dtype and back": lambda x: F.silu(x.to(torch.float32)).to(x.dtype),
    "dropout of nothing": lambda x: F.dropout(F.gelu(x), p=0.0, training=True),
}


@pytest.fixture
def layers() -> tuple[nn.Linear, nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(8, 20).double(), nn.Linear(20, 8).double(), torch.randn(2, 7, 8, dtype=torch.float64)


def defer(up: nn.Linear, x: Tensor, chunks: int) -> DeferredOutput:
    def run(finish, parameters) -> Tensor:
        return token_wise(
            lambda part: finish(up(part)), x, num_chunks=chunks, parameters=[*up.parameters(), *parameters]
        )

    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return defer_output(run, (*x.shape[:-1], up.out_features), dtype, x.device)


def run(up: nn.Linear, activation, down: nn.Linear, x: Tensor, chunks: int) -> Tensor:
    inner = activation(defer(up, x, chunks))
    assert isinstance(inner, DeferredOutput)
    assert inner.shape == (2, 7, 20)
    return inner.finish(down, down.parameters())


def gradients(result: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum(), tensors)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("chunks", [1, 3, 100])
def test_value_and_gradients_are_those_of_the_three_in_a_row(name, chunks, layers):
    up, down, x = layers
    activation = ACTIVATIONS[name]
    x.requires_grad_()
    tensors = [x, *up.parameters(), *down.parameters()]
    expected = down(activation(up(x)))
    result = run(up, activation, down, x, chunks)
    precision = 1e-6 if "dtype" in name else 1e-12
    torch.testing.assert_close(result, expected, rtol=precision, atol=precision)
    for new, old in zip(gradients(result, *tensors), gradients(expected, *tensors), strict=True):
        torch.testing.assert_close(new, old, rtol=100 * precision, atol=precision)


def test_whoever_looks_at_the_activation_gets_the_real_one(layers):
    up, down, x = layers
    inner = F.gelu(defer(up, x, 3))
    real = F.gelu(up(x))
    torch.testing.assert_close(inner.sum(-1), real.sum(-1))
    torch.testing.assert_close(torch.softmax(inner, dim=1), torch.softmax(real, dim=1))
    assert inner.was_computed
    result = inner.finish(down, down.parameters())
    grads = gradients(result, *up.parameters())
    for new, old in zip(grads, gradients(down(F.gelu(up(x))), *up.parameters()), strict=True):
        torch.testing.assert_close(new, old)


def test_a_mix_with_another_tensor_is_not_taken_for_pointwise_work(layers):
    up, _, x = layers
    inner = defer(up, x, 3)
    mask = torch.rand(2, 7, 20, dtype=torch.float64)
    torch.testing.assert_close(inner * mask, up(x) * mask)


def test_work_in_place_shows_in_the_tensor_itself_and_not_in_what_was_made_before(layers):
    up, _, x = layers
    inner = defer(up, x, 3)
    doubled = inner * 2
    assert F.relu(inner, inplace=True) is inner
    torch.testing.assert_close(inner.real(), F.relu(up(x)))
    torch.testing.assert_close(doubled.real(), 2 * up(x))


def test_dropout_draws_the_same_numbers_in_both_passes(layers):
    up, _, x = layers
    x = x[:1].clone().requires_grad_()
    torch.manual_seed(3)
    inner = F.dropout(defer(up, x, 4), p=0.5, training=True)
    result = inner.finish(lambda part: part, [])
    (grad,) = torch.autograd.grad(result.sum(), x)
    kept = (result != 0).to(x.dtype) * 2
    torch.testing.assert_close(grad, kept @ up.weight)


def test_it_keeps_the_input_and_not_the_activation():
    up, down = nn.Linear(16, 256), nn.Linear(256, 16)
    x = torch.randn(1, 512, 16, requires_grad=True)
    with TensorBytes() as held:
        inner = F.gelu(defer(up, x, 8))
        result = inner.finish(down, down.parameters())
    whole = 512 * 256 * 4
    assert held.live < 0.2 * whole
    assert held.peak < whole
    assert result.requires_grad


def test_its_dtype_under_autocast_is_the_one_that_the_projection_gives(layers):
    up, _, x = layers
    with torch.autocast("cpu", torch.bfloat16):
        inner = defer(up.float(), x.float(), 2)
        assert inner.dtype == torch.bfloat16
        assert (inner.float() * 2).dtype == torch.float32
    assert repr(inner) == "DeferredOutput(shape=(2, 7, 20), dtype=torch.bfloat16, device=cpu)"
