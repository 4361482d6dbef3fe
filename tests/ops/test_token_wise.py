from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops_tools import TOLERANCE, assert_close, total_distance
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_mst.memory import TensorBytes
from lightning_mst.ops import token_wise
from lightning_mst.ops.chunking import chunk_bounds

D, INNER = 8, 20


class GatedMLP(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor] = F.silu, d: int = D, inner: int = INNER) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(d, inner, bias=False), nn.Linear(d, inner, bias=False)
        self.down = nn.Linear(inner, d, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


def plain_mlp(d: int = D, inner: int = INNER, out: int | None = None, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, inner, bias=bias), nn.GELU(), nn.Linear(inner, out or d, bias=bias))


class Conv1D(nn.Module):
    """GPT-2's linear layer: weight transposed, ``addmm``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) * 0.3), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class LoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, INNER), nn.Linear(INNER, D)
        self.a, self.b = nn.Linear(INNER, 2, bias=False), nn.Linear(2, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        return self.down(h) + 2.0 * self.b(self.a(h))


class TwoBiases(nn.Module):
    """Autograd hands out one tensor as the gradient of both biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() * (self.first + self.second)


class UsesTheSameWeightTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.gelu(self.linear(x)))


class SumsAWeight(nn.Module):
    """The gradient of the weight is one number, expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.sum()


class AddsInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.extra = nn.Linear(D, D), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y += self.extra
        return y


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "SwiGLU": GatedMLP,
    "GeGLU": lambda: GatedMLP(nn.GELU(approximate="tanh")),
    "plain with bias": plain_mlp,
    "Conv1D": lambda: nn.Sequential(Conv1D(D, INNER), nn.GELU(), Conv1D(INNER, D)),
    "norm, MLP, norm": lambda: nn.Sequential(nn.RMSNorm(D), GatedMLP(), nn.LayerNorm(D)),
    "ends in an activation": lambda: nn.Sequential(plain_mlp(), nn.Tanh()),
    "ends in an in-place activation": lambda: nn.Sequential(plain_mlp(), nn.ReLU(inplace=True)),
    "adds in place to the last linear": AddsInPlace,
    "ends in an inactive dropout": lambda: nn.Sequential(plain_mlp(), nn.Dropout(0.0)),
    "LoRA": LoRA,
    "two biases": TwoBiases,
    "one weight twice": UsesTheSameWeightTwice,
    "sum of a weight": SumsAWeight,
    "wider output": lambda: plain_mlp(out=13),
    "narrower output": lambda: plain_mlp(out=3),
    "one output": lambda: plain_mlp(out=1),
    "linear": lambda: nn.Linear(D, 5),
    "no parameters": nn.Softplus,
    "hands its input on": nn.Identity,
}


def input_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def outcome(block: Callable[..., Any], inputs: list[Tensor], wanted: list[Tensor], seed: int = 7) -> tuple[Any, Any]:
    """Outputs, and gradients of a random weighting of them."""
    outputs = block(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]
    grads = torch.autograd.grad(outputs, wanted, weights, allow_unused=True)
    return [y.detach() for y in outputs], grads


def assert_exact(block: nn.Module, *inputs: Tensor, tolerance: float | None = None, **options: Any) -> None:
    wanted = [t for t in (*inputs, *block.parameters()) if t.requires_grad]
    y, grads = outcome(block, list(inputs), wanted)
    mini_y, mini_grads = outcome(
        lambda *xs: token_wise(block, xs if len(xs) > 1 else xs[0], **options), list(inputs), wanted
    )
    tolerance = TOLERANCE[inputs[0].dtype] if tolerance is None else tolerance
    assert_close(mini_y, y, tolerance, "output")
    assert_close(mini_grads, grads, tolerance, "gradient")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_in_mini_sequences_has_the_output_and_gradients_of_the_whole(name: str, dtype: torch.dtype) -> None:
    block = BLOCKS[name]().to(dtype)
    assert_exact(block, input_of((2, 7, D), dtype), num_chunks=4)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 7, D), {"num_chunks": 3}),
        ((1, 13, D), {"num_chunks": 4}),
        ((3, 5, D), {"num_chunks": 15}),
        ((2, 3, D), {"num_chunks": 64}),
        ((1, 1, D), {"num_chunks": 4}),
        ((11, D), {"num_chunks": 3}),
        ((2, 2, 3, D), {"num_chunks": 5}),
        ((2, 2, 3, D), {"chunk_tokens": 5}),
        ((1, 10, D), {"chunk_tokens": 3}),
        ((1, 10, D), {"chunk_tokens": 100}),
        ((4, 5, D), {"num_chunks": 1}),
        ((D,), {"num_chunks": 4}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["SwiGLU", "norm, MLP, norm"])
def test_any_shape_and_any_number_of_chunks_is_exact(
    name: str, shape: tuple[int, ...], options: dict[str, int]
) -> None:
    assert_exact(BLOCKS[name]().double(), input_of(shape), **options)


@pytest.mark.parametrize(
    "arrange",
    [
        lambda t: t.transpose(0, 1),
        lambda t: t[:, ::2],
        lambda t: t[..., : D * 2 : 2],
        lambda t: t[:, :1].expand(3, 4, -1),
    ],
    ids=["transposed", "strided tokens", "strided features", "expanded"],
)
def test_a_non_contiguous_input_is_exact(arrange: Callable[[Tensor], Tensor]) -> None:
    width = D * 2 if arrange(torch.empty(3, 4, D * 2)).shape[-1] == D else D
    base = torch.randn(3, 4, width, dtype=torch.float64)
    x = arrange(base).detach().requires_grad_()
    assert not x.is_contiguous()
    assert_exact(GatedMLP().double(), x, num_chunks=3)


def test_a_non_contiguous_gradient_of_the_output_is_exact() -> None:
    block, x = GatedMLP().double(), input_of((3, 4, D))
    wanted = [x, *block.parameters()]
    grad = torch.randn(D, 4, 3, dtype=torch.float64).permute(2, 1, 0)
    expected = torch.autograd.grad(block(x), wanted, grad)
    assert_close(torch.autograd.grad(token_wise(block, x, num_chunks=5), wanted, grad), expected, 1e-10)


def test_an_empty_batch_gives_an_empty_output_and_zero_gradients() -> None:
    block, x = GatedMLP().double(), input_of((0, 5, D))
    y = token_wise(block, x, num_chunks=4)
    assert y.shape == (0, 5, D)
    grads = torch.autograd.grad(y.sum(), [x, *block.parameters()])
    assert grads[0].shape == x.shape
    assert all(g.abs().sum() == 0 for g in grads)


# --- several inputs and outputs -----------------------------------------------------------------------------------


class Mixer(nn.Module):
    """Two inputs of different widths, three outputs of different ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, INNER), nn.Linear(3, INNER)
        self.out, self.side = nn.Linear(INNER, D), nn.Linear(INNER, 4)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.tanh(self.first(x) + self.second(z))
        return self.out(h), self.side(h).unflatten(-1, (2, 2)), h.square().mean(-1)


@pytest.mark.parametrize("num_chunks", [1, 3, 10])
def test_several_inputs_and_outputs_are_exact(num_chunks: int) -> None:
    assert_exact(Mixer().double(), input_of((2, 5, D)), input_of((2, 5, 3)), num_chunks=num_chunks)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_an_output_that_nobody_uses_costs_nobody_a_gradient(used: int) -> None:
    block, x, z = Mixer().double(), input_of((2, 5, D)), input_of((2, 5, 3))
    wanted = [x, z, *block.parameters()]
    expected = torch.autograd.grad(block(x, z)[used].sin().sum(), wanted, allow_unused=True)
    grads = torch.autograd.grad(token_wise(block, [x, z], num_chunks=3)[used].sin().sum(), wanted, allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted, strict=True)]
    expected = [torch.zeros_like(t) if g is None else g for g, t in zip(expected, wanted, strict=True)]
    assert_close(filled, expected, 1e-10)


def test_an_input_without_a_gradient_beside_one_with_is_exact() -> None:
    block = Mixer().double()
    assert_exact(block, input_of((2, 5, D)), torch.randn(2, 5, 3, dtype=torch.float64), num_chunks=4)
    assert_exact(block, torch.randn(2, 5, D, dtype=torch.float64), input_of((2, 5, 3)), num_chunks=4)


def test_an_integer_input_per_token_is_handed_through() -> None:
    scales = nn.Embedding(6, D).double()

    def block(x: Tensor, kind: Tensor) -> Tensor:
        return torch.tanh(x) * scales(kind)

    x, kind = input_of((2, 5, D)), torch.randint(6, (2, 5))
    wanted = [x, scales.weight]
    y, expected = outcome(block, [x, kind], wanted)
    mini_y, grads = outcome(
        lambda *t: token_wise(block, t, num_chunks=3, parameters=scales.parameters()), [x, kind], wanted
    )
    assert_close(mini_y, y, 1e-10)
    assert_close(grads, expected, 1e-10)


def test_inputs_with_different_leading_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"input 1 has shape \(2, 4, 3\)"):
        token_wise(Mixer().double(), [input_of((2, 5, D)), input_of((2, 4, 3))], num_chunks=2)


def test_no_input_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one input"):
        token_wise(GatedMLP(), [], num_chunks=2)


# --- who gets a gradient ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SwiGLU", "plain with bias", "norm, MLP, norm", "Conv1D"])
def test_parameters_get_their_gradients_when_the_input_needs_none(name: str) -> None:
    assert_exact(BLOCKS[name]().double(), torch.randn(2, 7, D, dtype=torch.float64), num_chunks=4)


def test_frozen_parameters_get_no_gradient_and_the_others_the_right_one() -> None:
    block = plain_mlp().double()
    block[0].requires_grad_(False)
    block[2].bias.requires_grad_(False)
    x = input_of((2, 7, D))
    expected = torch.autograd.grad(block(x).square().sum(), [x, block[2].weight])
    token_wise(block, x, num_chunks=4).square().sum().backward()
    assert_close([x.grad, block[2].weight.grad], expected, 1e-10)
    assert [p.grad is None for p in block.parameters()] == [True, True, False, True]


def test_a_frozen_block_still_hands_on_the_gradient_of_its_input() -> None:
    assert_exact(GatedMLP().double().requires_grad_(False), input_of((2, 7, D)), num_chunks=4)


def test_nothing_to_train_means_no_graph() -> None:
    y = token_wise(GatedMLP().requires_grad_(False), torch.randn(2, 7, D), num_chunks=4)
    assert not y.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_right_and_has_no_graph(mode: Callable[[], Any]) -> None:
    block, x = GatedMLP().double(), input_of((2, 7, D))
    with mode():
        y = token_wise(block, x, num_chunks=4)
        assert_close(y, block(x), 1e-10)
    assert not y.requires_grad


def test_an_unused_parameter_keeps_no_gradient() -> None:
    block = plain_mlp().double()
    block.register_parameter("unused", nn.Parameter(torch.randn(3, dtype=torch.float64)))
    token_wise(block, input_of((2, 7, D)), num_chunks=4).sum().backward()
    assert block.unused.grad is None
    assert block[0].weight.grad is not None


# --- ways to run a backward pass ----------------------------------------------------------------------------------


def grads_of(block: nn.Module, *more: Tensor) -> list[Tensor | None]:
    return [None if t.grad is None else t.grad.clone() for t in (*more, *block.parameters())]


def twins(name: str = "SwiGLU") -> tuple[nn.Module, nn.Module]:
    block = BLOCKS[name]().double()
    return block, copy.deepcopy(block)


def test_a_scaled_loss_scales_every_gradient() -> None:
    block, x = GatedMLP().double(), input_of((2, 7, D))
    expected = torch.autograd.grad(block(x).square().sum() * 8, [x, *block.parameters()])
    (token_wise(block, x, num_chunks=4).square().sum() * 8).backward()
    assert_close(grads_of(block, x), expected, 1e-10)


def test_four_accumulation_steps_add_up() -> None:
    plain, mini = twins()
    for step in range(4):
        x = torch.randn(2, 5 + step, D, dtype=torch.float64)
        (plain(x).square().sum() / 4).backward()
        (token_wise(mini, x, num_chunks=3).square().sum() / 4).backward()
    assert_close(grads_of(mini), grads_of(plain), 1e-10)


def test_retain_graph_gives_the_same_gradients_again() -> None:
    plain, mini = twins("norm, MLP, norm")
    x = input_of((2, 5, D))
    again = x.detach().clone().requires_grad_()
    loss, mini_loss = plain(x).square().sum(), token_wise(mini, again, num_chunks=3).square().sum()
    for keep in (True, True, False):
        loss.backward(retain_graph=keep)
        mini_loss.backward(retain_graph=keep)
        assert_close(grads_of(mini, again), grads_of(plain, x), 1e-10)
    with pytest.raises(RuntimeError, match="second time"):
        mini_loss.backward()


def test_each_output_may_be_differentiated_by_itself() -> None:
    block, x, z = Mixer().double(), input_of((2, 5, D)), input_of((2, 5, 3))
    wanted = [x, z, *block.first.parameters()]
    outputs, mini = block(x, z), token_wise(block, [x, z], num_chunks=3)
    for y, mini_y in zip(outputs, mini, strict=True):
        expected = torch.autograd.grad(y.sin().sum(), wanted, retain_graph=True)
        assert_close(torch.autograd.grad(mini_y.sin().sum(), wanted, retain_graph=True), expected, 1e-10)


def test_two_forward_passes_may_come_before_one_backward_pass() -> None:
    plain, mini = twins()
    first, second = input_of((2, 5, D)), input_of((1, 6, D))
    (plain(first).square().sum() + plain(second).sin().sum()).backward()
    expected = grads_of(plain, first, second)
    first.grad = second.grad = None
    one, two = token_wise(mini, first, num_chunks=3), token_wise(mini, second, num_chunks=4)
    (one.square().sum() + two.sin().sum()).backward()
    assert_close(grads_of(mini, first, second), expected, 1e-10)


def test_blocks_in_a_row_are_exact() -> None:
    plain, mini = twins("norm, MLP, norm")
    x = input_of((2, 5, D))
    plain(x + plain(x)).sin().sum().backward()
    expected = grads_of(plain, x)
    x.grad = None
    token_wise(mini, x + token_wise(mini, x, num_chunks=3), num_chunks=4).sin().sum().backward()
    assert_close(grads_of(mini, x), expected, 1e-10)


def test_autograd_grad_returns_gradients_and_writes_none() -> None:
    block, x = GatedMLP().double(), input_of((2, 7, D))
    expected = torch.autograd.grad(block(x).square().sum(), [block.down.weight, x])
    grads = torch.autograd.grad(token_wise(block, x, num_chunks=4).square().sum(), [block.down.weight, x])
    assert_close(grads, expected, 1e-10)
    assert all(g is None for g in grads_of(block, x))


@pytest.mark.parametrize("uses", [1, 2])
def test_a_hook_after_accumulation_fires_as_often_as_without_mini_sequences(uses: int) -> None:
    plain, mini = twins()

    def fired(block: nn.Module, run: Callable[[Tensor], Tensor]) -> list[list[Tensor]]:
        seen: list[list[Tensor]] = [[] for _ in block.parameters()]
        for place, parameter in zip(seen, block.parameters(), strict=True):
            parameter.register_post_accumulate_grad_hook(lambda p, place=place: place.append(p.grad.clone()))
        x = torch.linspace(-1, 1, 14 * D, dtype=torch.float64).view(2, 7, D).requires_grad_()
        for _ in range(2):
            block.zero_grad()
            y = run(x)
            (y if uses == 1 else run(y)).square().sum().backward()
        return seen

    expected = fired(plain, plain)
    seen = fired(mini, lambda x: token_wise(mini, x, num_chunks=4))
    assert [len(calls) for calls in seen] == [len(calls) for calls in expected] == [2, 2, 2]
    for calls, expected_calls in zip(seen, expected, strict=True):
        assert_close(calls, expected_calls, 1e-10)


def test_a_hook_on_a_weight_sees_its_whole_gradient_once_and_may_change_it() -> None:
    plain, mini = twins()
    for block in (plain, mini):
        block.seen = []

    def doubled(block: nn.Module, grad: Tensor) -> Tensor:
        block.seen.append(grad)
        return 2 * grad

    for block in (plain, mini):
        for parameter in block.parameters():
            parameter.register_hook(partial(doubled, block))
    x = input_of((2, 7, D))
    plain(x).square().sum().backward()
    token_wise(mini, x, num_chunks=4).square().sum().backward()
    assert len(mini.seen) == len(plain.seen) == 3
    assert_close([p.grad for p in mini.parameters()], [p.grad for p in plain.parameters()], 1e-10)


def test_chunks_add_up_one_weights_gradient_at_a_time() -> None:
    mlp = GatedMLP(d=64, inner=256)
    x = torch.randn(1, 8, 64, requires_grad=True)
    with TensorBytes([x, *mlp.parameters()]) as tracker:
        token_wise(mlp, x, num_chunks=2).sum().backward()
    weight = mlp.down.weight.nbytes
    # Beside the sums of all three: one more, but not the three of a chunk. What few tokens take is far below one.
    assert 4 * weight <= tracker.peak < 4.7 * weight


def test_an_optimizer_in_the_backward_pass_steps_on_whole_gradients() -> None:
    plain, mini = twins()
    x = input_of((2, 7, D))
    plain(x).square().sum().backward()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter -= 0.1 * parameter.grad

    def step(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    for parameter in mini.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    token_wise(mini, x, num_chunks=4).square().sum().backward()
    assert_close(list(mini.parameters()), list(plain.parameters()), 1e-10)


def test_gradients_do_not_share_memory() -> None:
    block, x = TwoBiases().double(), input_of((2, 7, D))
    token_wise(block, x, num_chunks=4).sum().backward()
    before = block.second.grad.clone()
    block.first.grad.mul_(0)
    assert torch.equal(block.second.grad, before)


def test_the_incoming_gradient_is_left_as_it_was() -> None:
    block, x = AddsOnly().double(), input_of((2, 7, D))
    grad = torch.randn(2, 7, D, dtype=torch.float64)
    before = grad.clone()
    token_wise(block, x, num_chunks=14).backward(grad)
    assert torch.equal(grad, before)
    assert_close(block.bias.grad, before.sum((0, 1), keepdim=True), 1e-10)


class AddsOnly(nn.Module):
    """With one token in a chunk the gradient of the bias is a view of the incoming one."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 1, D))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.view(D)


def test_weights_changed_between_forward_and_backward_are_noticed() -> None:
    block, x = GatedMLP().double(), input_of((2, 7, D))
    y = token_wise(block, x, num_chunks=4)
    with torch.no_grad():
        block.up.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_input_changed_between_forward_and_backward_is_noticed() -> None:
    block, x = GatedMLP().double(), input_of((2, 7, D))
    inner = x * 1.0
    y = token_wise(block, inner, num_chunks=4)
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reduce", [torch.sum, torch.norm])
def test_a_second_derivative_is_refused(reduce: Callable[[Tensor], Tensor]) -> None:
    """Silence would be a gradient penalty that has no effect."""
    block, x = GatedMLP().double(), input_of((2, 7, D))
    loss = reduce(token_wise(block, x, num_chunks=4))

    def penalized() -> None:
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + grad.square().sum()).backward()

    with pytest.raises(RuntimeError, match=r"once_differentiable|create_graph|second derivative"):
        penalized()


# --- what is not a token-wise block -------------------------------------------------------------------------------


@pytest.mark.parametrize("needs_grad", [True, False], ids=["input with gradient", "input without gradient"])
def test_a_function_that_uses_undeclared_parameters_is_refused(needs_grad: bool) -> None:
    mlp = GatedMLP().double()
    x = torch.randn(2, 7, D, dtype=torch.float64, requires_grad=needs_grad)

    def run() -> None:
        token_wise(lambda t: mlp(t), x, num_chunks=4).sum().backward()

    with pytest.raises(RuntimeError, match=r"parameters=\["):
        run()


def test_a_function_that_names_only_some_of_its_parameters_is_refused() -> None:
    mlp = GatedMLP().double()
    y = token_wise(lambda t: mlp(t), input_of((2, 7, D)), num_chunks=4, parameters=[mlp.up.weight, mlp.down.weight])
    with pytest.raises(RuntimeError, match="gradient would be lost"):
        y.sum().backward()


def test_a_function_with_declared_parameters_is_exact() -> None:
    mlp, x = GatedMLP().double(), input_of((2, 7, D))
    wanted = [x, *mlp.parameters()]
    expected = torch.autograd.grad(mlp(x).sin().sum(), wanted)
    y = token_wise(lambda t: mlp(t), x, num_chunks=4, parameters=mlp.parameters())
    assert_close(torch.autograd.grad(y.sin().sum(), wanted), expected, 1e-10)


def test_parameters_that_are_results_of_a_computation_get_their_gradients_through_it() -> None:
    """As with weight norm and other parametrizations."""
    scale, base, x = input_of((1,)), input_of((D, D)), input_of((2, 7, D))
    wanted = [scale, base, x]
    expected = torch.autograd.grad(F.linear(x, base * scale).sin().sum(), wanted)
    weight = base * scale
    y = token_wise(lambda t: F.linear(t, weight), x, num_chunks=4, parameters=[weight])
    assert_close(torch.autograd.grad(y.sin().sum(), wanted), expected, 1e-10)


@pytest.mark.parametrize(
    "block",
    [lambda t: t.sum(1), lambda t: t[:, 1:], lambda t: t.reshape(-1), lambda t: t.transpose(1, 2)],
    ids=range(4),
)
def test_a_block_that_changes_the_number_of_tokens_is_refused(block: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="not token-wise"):
        token_wise(block, input_of((2, 8, D)), num_chunks=4)


@pytest.mark.parametrize("options", [{}, {"num_chunks": 2, "chunk_tokens": 2}, {"num_chunks": 0}, {"num_chunks": True}])
def test_a_wrong_number_of_chunks_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="num_chunks"):
        token_wise(GatedMLP().double(), input_of((2, 7, D)), **options)


# --- half precision and autocast ----------------------------------------------------------------------------------


def sum_of_errors(*, autocast: bool, num_chunks: int, tokens: int, seeds: int = 4) -> tuple[float, float]:
    """Gradient errors against fp64 of the plain block and of the one in mini-sequences, in bf16."""
    plain_error = mini_error = 0.0
    dtype = torch.float32 if autocast else torch.bfloat16
    for seed in range(seeds):
        torch.manual_seed(seed)
        block = GatedMLP(d=32, inner=64).to(dtype)
        x = torch.randn(2, tokens // 2, 32).to(dtype).requires_grad_()
        truth_block, truth_x = copy.deepcopy(block).double(), x.detach().double().requires_grad_()
        grad = torch.randn(2, tokens // 2, 32).bfloat16()
        truth = torch.autograd.grad(truth_block(truth_x), [truth_x, *truth_block.parameters()], grad.double())
        for which in ("plain", "mini"):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = block(x) if which == "plain" else token_wise(block, x, num_chunks=num_chunks)
            assert y.dtype == torch.bfloat16
            grads = torch.autograd.grad(y, [x, *block.parameters()], grad)
            assert all(g.dtype == dtype for g in grads)
            if which == "plain":
                plain_error += total_distance(grads, truth)
            else:
                mini_error += total_distance(grads, truth)
    return plain_error, mini_error


@pytest.mark.parametrize(("num_chunks", "tokens"), [(3, 64), (16, 512), (256, 512), (256, 256)])
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_bf16_gradients_are_as_near_to_the_truth_as_without_mini_sequences(
    autocast: bool, num_chunks: int, tokens: int
) -> None:
    plain, mini = sum_of_errors(autocast=autocast, num_chunks=num_chunks, tokens=tokens)
    assert mini <= 1.1 * plain


def test_a_backward_pass_inside_the_autocast_block_gives_the_same_gradients_as_outside() -> None:
    block, x = GatedMLP(), input_of((2, 7, D), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(token_wise(block, x, num_chunks=4).float().sum(), [x, *block.parameters()])
        y = token_wise(block, x, num_chunks=4)
    outside = torch.autograd.grad(y.float().sum(), [x, *block.parameters()])
    assert_close(inside, outside, 0.0)


def test_a_backward_pass_under_autocast_does_not_change_an_fp32_forward_pass() -> None:
    block, x = GatedMLP(), input_of((2, 7, D), torch.float32)
    expected = torch.autograd.grad(block(x).sum(), [x, *block.parameters()])
    y = token_wise(block, x, num_chunks=4)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(y.sum(), [x, *block.parameters()])
    assert_close(grads, expected, 1e-5)


def test_a_weight_used_again_in_the_same_autocast_block_keeps_that_gradient() -> None:
    block, x = GatedMLP(), input_of((2, 7, D), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            token_wise(block, x, num_chunks=4)
        token_wise(block, x, num_chunks=4)
        y = F.linear(x, block.up.weight)
    (grad,) = torch.autograd.grad(y.float().sum(), [block.up.weight])
    assert_close(grad, x.detach().sum((0, 1)).expand(INNER, D), 2e-2)


# --- random numbers -----------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.inner, self.outer = plain_mlp(), nn.Dropout(0.3), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        up, act, down = self.mlp
        return self.outer(down(self.inner(act(up(x)))))


def chunk_by_chunk(block: Callable[[Tensor], Tensor], x: Tensor, num_chunks: int) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    parts = [block(rows[a:b].unsqueeze(0)).squeeze(0) for a, b in chunk_bounds(rows.shape[0], num_chunks)]
    return torch.cat(parts).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_recomputed_chunk_drops_what_its_first_run_dropped(checkpointed: bool) -> None:
    block, x = Dropping().double(), input_of((2, 7, D))
    wanted = [x, *block.parameters()]
    torch.manual_seed(3)
    y = chunk_by_chunk(block, x, 4)
    expected = torch.autograd.grad(y.square().sum(), wanted)
    state = torch.get_rng_state()

    def run(t: Tensor) -> Tensor:
        return token_wise(block, t, num_chunks=4)

    torch.manual_seed(3)
    mini = checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
    grads = torch.autograd.grad(mini.square().sum(), wanted)
    assert torch.equal(mini, y)
    assert_close(grads, expected, 1e-10)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_numbers_drawn_between_forward_and_backward_do_not_disturb_the_recomputation() -> None:
    block, x = Dropping().double(), input_of((2, 7, D))
    wanted = [x, *block.parameters()]
    torch.manual_seed(3)
    expected = torch.autograd.grad(chunk_by_chunk(block, x, 4).square().sum(), wanted)
    torch.manual_seed(3)
    mini = token_wise(block, x, num_chunks=4)
    torch.manual_seed(11)
    torch.rand(100)
    state = torch.get_rng_state()
    assert_close(torch.autograd.grad(mini.square().sum(), wanted), expected, 1e-10)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_output_is_bit_for_bit_that_of_the_chunks_run_one_by_one() -> None:
    block, x = GatedMLP(), input_of((3, 7, D), torch.float32)
    assert torch.equal(token_wise(block, x, num_chunks=5), chunk_by_chunk(block, x, 5))


# --- hooks --------------------------------------------------------------------------------------------------------


def test_a_forward_hook_on_the_last_linear_layer_sees_only_values_that_were_computed() -> None:
    block, x = GatedMLP().double(), input_of((2, 6, D))
    seen: list[Tensor] = []
    block.down.register_forward_hook(lambda module, args, output: seen.append(output.detach() * 1))
    token_wise(block, x, num_chunks=3).sum().backward()
    chunks = chunk_by_chunk(block, x, 3).detach().view(3, 1, 4, D)
    for output in seen:
        assert any(torch.allclose(output, chunk) for chunk in chunks)


def test_a_forward_hook_that_changes_the_last_output_counts() -> None:
    block = GatedMLP().double()
    block.down.register_forward_hook(lambda module, args, output: output * 3)
    assert_exact(block, input_of((2, 6, D)), num_chunks=3)


def test_a_forward_hook_that_changes_the_last_output_in_place_counts() -> None:
    block = GatedMLP().double()
    block.down.register_forward_hook(lambda module, args, output: output.mul_(3))
    assert_exact(block, input_of((2, 6, D)), num_chunks=3)


# --- checkpointing, matmuls, bytes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SwiGLU", "plain with bias", "norm, MLP, norm", "Conv1D", "ends in an activation"])
def test_checkpointed_residual_layers_are_exact(name: str) -> None:
    block, x = BLOCKS[name]().double(), input_of((2, 7, D))
    wanted = [x, *block.parameters()]

    def layer(t: Tensor) -> Tensor:
        return t + token_wise(block, t.sin(), num_chunks=4)

    once = x + block(x.sin())
    y = once + block(once.sin())
    expected = torch.autograd.grad(y.square().sum(), wanted)
    mini = checkpoint(layer, checkpoint(layer, x, use_reentrant=False), use_reentrant=False)
    assert_close(mini, y, 1e-10)
    assert_close(torch.autograd.grad(mini.square().sum(), wanted), expected, 1e-10)


TOKENS, WIDE = 24, 32


def units(block: nn.Module, *, mini: bool, checkpointed: bool, x_needs_grad: bool = True) -> float:
    """Matmul work of forward and backward in units of one matmul of the MLP over all tokens."""
    x = torch.randn(2, TOKENS // 2, D, requires_grad=x_needs_grad)

    def layer(t: Tensor) -> Tensor:
        return t + (token_wise(block, t, num_chunks=5) if mini else block(t))

    with FlopCounterMode(display=False) as counter:
        y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        y.backward(torch.randn_like(y))
    return counter.get_total_flops() / (2 * TOKENS * D * WIDE)


@pytest.mark.parametrize(
    ("mini", "checkpointed", "expected"), [(False, False, 9), (False, True, 11), (True, False, 11), (True, True, 11)]
)
def test_a_gated_mlp_takes_no_more_matmuls_than_plain_checkpointing(
    mini: bool, checkpointed: bool, expected: float
) -> None:
    count = units(GatedMLP(inner=WIDE), mini=mini, checkpointed=checkpointed)
    if mini:
        assert count <= expected
    else:
        assert count == expected


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda: plain_mlp(inner=WIDE), 7),
        (lambda: nn.Sequential(nn.LayerNorm(D), plain_mlp(inner=WIDE)), 7),
        (lambda: nn.Sequential(plain_mlp(inner=WIDE), nn.LayerNorm(D)), 8),
        (lambda: nn.Sequential(Conv1D(D, WIDE), nn.GELU(), Conv1D(WIDE, D)), 8),
    ],
    ids=["plain", "norm first", "norm last", "Conv1D"],
)
def test_a_plain_mlp_takes_at_most_four_passes_in_a_checkpointed_layer(
    make: Callable[[], nn.Module], most: int
) -> None:
    assert units(make(), mini=True, checkpointed=True) <= most
    assert most / 2 <= 4.0


def test_frozen_weights_cost_no_matmul() -> None:
    block = GatedMLP(inner=WIDE)
    block.down.requires_grad_(False)
    assert units(block, mini=True, checkpointed=True) <= 10
    block.requires_grad_(False)
    # Forward 3, recomputation of gate and up 2, gradient of the input 3.
    assert units(block, mini=True, checkpointed=True) <= 8


def test_a_frozen_input_costs_no_matmul() -> None:
    # Forward 3, recomputation 2, weights 3, gradient of the inner activation 1.
    assert units(GatedMLP(inner=WIDE), mini=True, checkpointed=False, x_needs_grad=False) <= 9


def saved_bytes(block: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> int:
    known = {p.untyped_storage()._cdata for p in block.parameters()}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run(x)
    assert y.requires_grad
    return sum(s.nbytes() for s in storages.values())


@pytest.mark.parametrize("inner", [16, 256])
@pytest.mark.parametrize("num_chunks", [2, 12])
@pytest.mark.parametrize("normed", [False, True])
def test_nothing_but_the_input_is_saved_for_the_backward_pass(inner: int, num_chunks: int, normed: bool) -> None:
    block: nn.Module = GatedMLP(inner=inner)
    if normed:
        block = nn.Sequential(nn.RMSNorm(D), block, nn.RMSNorm(D))
    x = input_of((2, 64, D), torch.float32)
    assert saved_bytes(block, lambda t: token_wise(block, t, num_chunks=num_chunks), x) <= x.nbytes
    assert saved_bytes(block, block, x) > 2 * x.nbytes


@pytest.mark.parametrize("num_chunks", [2, 32])
def test_no_tensor_but_the_output_stays_alive_after_the_forward_pass(num_chunks: int) -> None:
    block, x = GatedMLP(inner=256), input_of((2, 512, D), torch.float32)
    rng_state = torch.get_rng_state().nbytes
    with TensorBytes([x, *block.parameters()]) as memory:
        y = token_wise(block, x, num_chunks=num_chunks)
    assert memory.live <= y.nbytes + rng_state + 64
    with TensorBytes([x, *block.parameters()]) as plain:
        kept = block(x)
    assert plain.live > 10 * kept.nbytes


def test_the_peak_falls_with_the_number_of_chunks() -> None:
    block, x = GatedMLP(inner=256), input_of((2, 512, D), torch.float32)
    fixed = 3 * x.nbytes + 2 * sum(p.nbytes for p in block.parameters())
    peaks = []
    for num_chunks in (4, 16, 64):
        block.zero_grad()
        x.grad = None
        with TensorBytes([x, *block.parameters()]) as memory:
            token_wise(block, x, num_chunks=num_chunks).sum().backward()
        peaks.append(memory.peak - fixed)
    inner_bytes = 1024 * 256 * 4
    # At most eight inner activations of one chunk.
    assert peaks[0] <= 8 * inner_bytes / 4
    assert peaks[1] <= 8 * inner_bytes / 16
    assert peaks[2] <= 8 * inner_bytes / 64
