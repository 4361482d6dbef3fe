"""LM heads that are more than a linear layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops_tools import B, D, Matmuls, S, V, assert_close, total_distance
from torch import Tensor, nn

from lightning_mst.ops import LinearHead, ModuleHead, head_cross_entropy, linear_cross_entropy
from lightning_mst.ops.deferred_logits import defer_logits

CHUNKS = (1, 3, 99)


class LowRank(nn.Module):
    """A frozen linear layer with a trained low-rank correction."""

    def __init__(self, rank: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = nn.Linear(D, V).requires_grad_(False)
        self.down, self.up = nn.Linear(D, rank, bias=False), nn.Linear(rank, V, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(self.dropout(x))) * 2.0


class Scaled(nn.Module):
    """A linear layer whose output is scaled by a learned vector and a learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, V, bias=False)
        self.classes = nn.Parameter(torch.rand(V))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) * self.classes) * self.scale


HEADS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D, V),
    "low-rank": LowRank,
    "scaled": Scaled,
    "transform": lambda: nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D), nn.Linear(D, V)),
    "shared weight": lambda: shared(),
    "in place": lambda: nn.Sequential(nn.Linear(D, V), nn.ReLU(inplace=True)),
    "no parameters": lambda: nn.Identity(),
}  # fmt: skip


def shared() -> nn.Module:
    first, second = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Linear(D, V))


def as_head(module: nn.Module, dtype: torch.dtype = torch.float64, vocab_size: int = V) -> ModuleHead:
    return ModuleHead(module, tuple(module.parameters()), vocab_size, dtype)


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    module = HEADS[name]().to(dtype)
    width = V if name == "no parameters" else D
    hidden = torch.randn(B, S, width, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(V, (B, S))
    labels.view(-1)[::4] = -100
    return module, hidden, labels


def grads_of(loss: Tensor, module: nn.Module, hidden: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [hidden, *(p for p in module.parameters() if p.requires_grad)]
    return torch.autograd.grad(loss, wanted, torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape))


@pytest.mark.parametrize("num_chunks", CHUNKS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", HEADS)
def test_loss_and_all_gradients_are_those_of_the_whole(name: str, reduction: str, num_chunks: int) -> None:
    module, hidden, labels = make(name)
    expected = F.cross_entropy(module(hidden).flatten(0, 1), labels.flatten(), reduction=reduction)
    expected = expected.view(B, S) if reduction == "none" else expected
    loss = head_cross_entropy(hidden, as_head(module), labels, num_chunks=num_chunks, reduction=reduction)  # type: ignore[arg-type]
    assert_close(loss, expected, 1e-10, "loss")
    assert_close(grads_of(loss, module, hidden), grads_of(expected, module, hidden), 1e-10, "gradient")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_options_mean_what_they_mean_for_a_linear_head(reduction: str) -> None:
    module, hidden, labels = make("linear")
    options: dict[str, Any] = {
        "num_chunks": 3,
        "reduction": reduction,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "logits_fn": lambda logits: 3.0 * torch.tanh(logits / 3.0),
        "class_weights": torch.linspace(0.5, 1.5, V, dtype=torch.float64),
        "return_num_correct": True,
    }
    expected, count = linear_cross_entropy(hidden, module.weight, labels, bias=module.bias, **options)
    expected_grads = grads_of(expected, module, hidden)
    for head in (as_head(module), LinearHead(module.weight, module.bias)):
        loss, correct = head_cross_entropy(hidden, head, labels, **options)
        assert correct == count
        assert_close(loss, expected, 1e-10)
        assert_close(grads_of(loss, module, hidden), expected_grads, 1e-10)


def test_frozen_parameters_cost_no_matmul() -> None:
    module, hidden, labels = make("low-rank")
    labels.clamp_(min=0)
    with Matmuls() as counter:
        grads_of(head_cross_entropy(hidden, as_head(module), labels, num_chunks=3), module, hidden)
    tokens, rank = B * S, 2
    # Two passes over the frozen weight, three over each of the two small ones.
    assert counter.multiply_adds == 2 * tokens * D * V + 3 * tokens * rank * (D + V)


def test_a_trained_head_costs_three_passes() -> None:
    module, hidden, labels = make("linear")
    labels.clamp_(min=0)
    with Matmuls() as counter:
        grads_of(head_cross_entropy(hidden, as_head(module), labels, num_chunks=3), module, hidden)
    assert counter.multiply_adds == 3 * B * S * D * V


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_frozen_trunk_leaves_the_heads_gradients(reduction: str) -> None:
    module, hidden, labels = make("transform")
    frozen = hidden.detach()
    expected = F.cross_entropy(module(frozen).flatten(0, 1), labels.flatten(), reduction=reduction).sum()
    loss = head_cross_entropy(frozen, as_head(module), labels, num_chunks=3, reduction=reduction).sum()  # type: ignore[arg-type]
    parameters = list(module.parameters())
    assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), 1e-10)


def test_each_parameter_gets_its_gradient_once() -> None:
    module, hidden, labels = make("transform")
    seen: list[int] = []
    for index, parameter in enumerate(module.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda _, index=index: seen.append(index))
    head_cross_entropy(hidden, as_head(module), labels, num_chunks=4).backward()
    assert sorted(seen) == list(range(6))


def test_a_parameter_that_the_head_does_not_use_has_no_gradient() -> None:
    module, hidden, labels = make("linear")
    spare = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    head = ModuleHead(module, (*module.parameters(), spare), V, torch.float64)
    assert torch.autograd.grad(head_cross_entropy(hidden, head, labels, num_chunks=2), [spare], allow_unused=True) == (
        None,
    )


@pytest.mark.parametrize("keep", [True, False])
def test_the_incoming_gradient_counts_and_the_graph_can_be_kept(keep: bool) -> None:
    module, hidden, labels = make("scaled", torch.float32)
    loss = head_cross_entropy(hidden, as_head(module, torch.float32), labels, num_chunks=2)
    wanted = [hidden, *module.parameters()]
    expected = torch.autograd.grad(8 * F.cross_entropy(module(hidden).flatten(0, 1), labels.flatten()), wanted)
    for _ in range(1 + keep):
        assert_close(torch.autograd.grad(8 * loss, wanted, retain_graph=keep), expected, 1e-5)


def test_every_label_ignored_gives_nan_and_zero_gradients() -> None:
    module, hidden, labels = make("scaled")
    labels.fill_(-100)
    loss = head_cross_entropy(hidden, as_head(module), labels, num_chunks=2)
    assert loss.isnan()
    assert all(not g.any() for g in torch.autograd.grad(loss, [hidden, *module.parameters()]))


def test_under_no_grad_there_is_no_graph() -> None:
    module, hidden, labels = make("transform")
    with torch.no_grad():
        loss = head_cross_entropy(hidden, as_head(module), labels, num_chunks=2)
        assert_close(loss, F.cross_entropy(module(hidden).flatten(0, 1), labels.flatten()), 1e-10)
    assert not loss.requires_grad


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_dropout_in_the_head_is_the_same_in_both_directions(reduction: str) -> None:
    """The loss is linear in a bias-free head's weight along the drawn mask, so its gradient tells the mask."""
    module, hidden, labels = LowRank(dropout=0.5).double(), *make("linear")[1:]
    labels.clamp_(min=0)
    head = as_head(module)

    def loss() -> Tensor:
        torch.manual_seed(5)
        return head_cross_entropy(hidden, head, labels, num_chunks=3, reduction=reduction).sum()  # type: ignore[arg-type]

    (grad,) = torch.autograd.grad(loss(), hidden)
    direction, step = torch.randn_like(hidden), 1e-6
    with torch.no_grad():
        hidden += step * direction
        above = loss()
        hidden -= 2 * step * direction
        below = loss()
    assert_close((above - below) / (2 * step), (grad * direction).sum(), 1e-6)
    after = torch.rand(1)
    torch.manual_seed(5)
    loss_value = head_cross_entropy(hidden, head, labels, num_chunks=3, reduction=reduction).sum()  # type: ignore[arg-type]
    loss_value.backward()
    assert torch.equal(torch.rand(1), after), "backward drew random numbers"


@pytest.mark.parametrize("form", ["bf16", "autocast"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision_is_as_near_to_the_truth_as_the_whole(reduction: str, form: str) -> None:
    errors = [0.0, 0.0]
    for seed in range(8):
        torch.manual_seed(seed)
        module, hidden, labels = make("low-rank", torch.bfloat16 if form == "bf16" else torch.float32)
        exact, exact_hidden = copy.deepcopy(module).double(), hidden.detach().double().requires_grad_()
        truth = F.cross_entropy(exact(exact_hidden).flatten(0, 1), labels.flatten(), reduction=reduction).sum()
        true_grads = grads_of(truth, exact, exact_hidden)
        for index in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
                if index:
                    loss = head_cross_entropy(
                        hidden,
                        as_head(module, torch.bfloat16),
                        labels,
                        num_chunks=10,
                        reduction=reduction,  # type: ignore[arg-type]
                    ).sum()
                else:
                    logits = module(hidden).float().flatten(0, 1)
                    loss = F.cross_entropy(logits, labels.flatten(), reduction=reduction).sum()
            assert loss.dtype == torch.float32
            errors[index] += total_distance([loss, *grads_of(loss, module, hidden)], [truth, *true_grads])
    assert errors[1] <= 1.1 * errors[0]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_weight_used_again_in_the_same_autocast_block_keeps_that_gradient(reduction: str, grad: bool) -> None:
    module, hidden, labels = make("linear", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(grad):
            head_cross_entropy(hidden, as_head(module, torch.bfloat16), labels, num_chunks=2, reduction=reduction)  # type: ignore[arg-type]
        again = module(hidden).sum()
    (weight_grad,) = torch.autograd.grad(again, [module.weight])
    assert weight_grad.norm() > 0


# --- deferred -----------------------------------------------------------------------------------------------------

USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda x, y: F.cross_entropy(x.float().double().flatten(0, 1), y.flatten()),
    "soft-capped": lambda x, y: F.cross_entropy(torch.tanh(x / 2.0).flatten(0, 1) * 2.0, y.flatten(), reduction="sum"),
    "log_softmax, gather": lambda x, y: x.log_softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).sum(),
    "chosen minus logsumexp": lambda x, y: (
        x.gather(-1, y.clamp(min=0).unsqueeze(-1)) - x.logsumexp(-1, keepdim=True)
    ).mean(),
    "entropy": lambda x, y: -(x.softmax(-1) * x.log_softmax(-1)).sum(),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", HEADS)
def test_deferred_logits_of_any_head_are_exact(name: str, use: str, never_real: None) -> None:
    module, hidden, labels = make(name)
    expected = USES[use](module(hidden), labels)
    logits = defer_logits(hidden, as_head(module), split={"num_chunks": 3})
    assert logits.shape == (B, S, V)
    value = USES[use](logits, labels)
    tolerance = 1e-6 if use == "cross_entropy" else 1e-10
    assert_close(value, expected, tolerance)
    assert_close(grads_of(value, module, hidden), grads_of(expected, module, hidden), tolerance)


@pytest.mark.filterwarnings("ignore::lightning_mst.ops.deferred_logits.DeferredLogitsWarning")
def test_real_logits_of_any_head_are_exact() -> None:
    module, hidden, _ = make("transform")
    expected = module(hidden).cumsum(-1).sum()
    value = defer_logits(hidden, as_head(module), split={"num_chunks": 3}).cumsum(-1).sum()
    assert_close(value, expected, 1e-10)
    assert_close(grads_of(value, module, hidden), grads_of(expected, module, hidden), 1e-10)


# --- errors -------------------------------------------------------------------------------------------------------


def test_a_tensor_that_was_not_named_is_refused() -> None:
    module, hidden, labels = make("linear")
    head = ModuleHead(module, (module.weight,), V, torch.float64)
    with pytest.raises(RuntimeError, match=r"ModuleHead\.parameters"):
        head_cross_entropy(hidden, head, labels, num_chunks=2)


def test_a_head_of_another_width_is_refused() -> None:
    module, hidden, labels = make("linear")
    with pytest.raises(ValueError, match=r"must map rows .* to logits"):
        head_cross_entropy(hidden, as_head(module, vocab_size=V + 1), labels, num_chunks=2)


def test_a_bias_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="bias must have shape"):
        head_cross_entropy(
            torch.zeros(2, D), LinearHead(torch.zeros(V, D), torch.zeros(3)), torch.zeros(2).long(), num_chunks=1
        )


def test_gradients_of_gradients_are_refused_clearly() -> None:
    module, hidden, labels = make("linear")
    loss = head_cross_entropy(hidden, as_head(module), labels, num_chunks=2)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, hidden, create_graph=True)
