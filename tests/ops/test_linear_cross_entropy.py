from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops_tools import Matmuls, assert_close, distance, total_distance
from torch import Tensor

from lightning_mst.memory import TensorBytes
from lightning_mst.ops import linear_cross_entropy

D, V, B, S = 6, 17, 2, 7
CHUNKS = (1, 3, 100)

LOGITS_FNS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "plain": None,
    "scaled": lambda logits: logits * 0.7,
    "soft-capped": lambda logits: 3.0 * torch.tanh(logits / 3.0),
    "float": lambda logits: logits.float(),
}

PATTERNS: dict[str, Callable[[Tensor], None]] = {
    "none ignored": lambda labels: None,
    "first ignored": lambda labels: labels[0, 0:1].fill_(-100),
    "last ignored": lambda labels: labels[-1, -1:].fill_(-100),
    "some ignored": lambda labels: labels[:, ::3].fill_(-100),
    "one sequence ignored": lambda labels: labels[0].fill_(-100),
    "all but one ignored": lambda labels: labels.view(-1)[:-1].fill_(-100),
}


def make(
    dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (B, S), *, d: int = D, v: int = V
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(*shape, d, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, d, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(v, shape)


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logits_fn: Callable[[Tensor], Tensor] | None = None,
    class_weights: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The unmodified computation."""
    logits = F.linear(hidden, weight, bias)
    if logits_fn is not None:
        logits = logits_fn(logits)
    weights = None if class_weights is None else class_weights.to(logits.dtype)
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), weight=weights, **options)
    return loss.view(labels.shape) if options.get("reduction") == "none" else loss


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("logits_fn", LOGITS_FNS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients_equal_cross_entropy(
    reduction: str, logits_fn: str, dtype: torch.dtype, pattern: str
) -> None:
    hidden, weight, labels = make(dtype)
    PATTERNS[pattern](labels)
    any_bias, any_weights = torch.randn(V, dtype=dtype, requires_grad=True), torch.rand(V, dtype=dtype) + 0.2
    tolerance = 1e-10 if dtype == torch.float64 and logits_fn != "float" else 1e-5
    for smoothing, bias, weights in itertools.product((0.0, 0.1), (None, any_bias), (None, any_weights)):
        options = {
            "reduction": reduction, "label_smoothing": smoothing, "bias": bias, "class_weights": weights,
            "logits_fn": LOGITS_FNS[logits_fn],
        }  # fmt: skip
        wanted = [hidden, weight] if bias is None else [hidden, weight, bias]
        loss = reference(hidden, weight, labels, **options)
        incoming = torch.randn_like(loss)
        expected = torch.autograd.grad(loss, wanted, incoming)
        for num_chunks in CHUNKS:
            what = f"smoothing={smoothing}, bias={bias is not None}, weights={weights is not None}, M={num_chunks}"
            mini = linear_cross_entropy(hidden, weight, labels, num_chunks=num_chunks, **options)
            assert_close(mini, loss, tolerance, what)
            assert_close(torch.autograd.grad(mini, wanted, incoming), expected, tolerance, what)


@pytest.mark.parametrize("split", [{"num_chunks": 5}, {"chunk_tokens": 4}, {"chunk_tokens": 1}, {"chunk_tokens": 99}])
def test_any_split_is_exact_where_it_does_not_divide_the_tokens(split: dict[str, int]) -> None:
    hidden, weight, labels = make(shape=(3, 7))
    labels[1, 2:4] = -100
    loss = reference(hidden, weight, labels)
    mini = linear_cross_entropy(hidden, weight, labels, **split)
    assert_close(mini, loss, 1e-10)
    expected = torch.autograd.grad(loss, [hidden, weight])
    assert_close(torch.autograd.grad(mini, [hidden, weight]), expected, 1e-10)


def test_the_mean_is_over_tokens_and_not_over_mini_sequences() -> None:
    hidden, weight, labels = make(shape=(1, 9))
    labels[0, 1:5] = -100
    per_token = reference(hidden, weight, labels, reduction="none")
    assert_close(linear_cross_entropy(hidden, weight, labels, num_chunks=2), per_token.sum() / 5, 1e-10)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_hidden_states_of_any_rank_are_exact(shape: tuple[int, ...], reduction: str) -> None:
    hidden, weight, labels = make(shape=shape)
    loss = reference(hidden, weight, labels, reduction=reduction)
    mini = linear_cross_entropy(hidden, weight, labels, num_chunks=2, reduction=reduction)
    assert_close(mini, loss, 1e-10)
    expected = torch.autograd.grad(loss.sum(), [hidden, weight])
    assert_close(torch.autograd.grad(mini.sum(), [hidden, weight]), expected, 1e-10)


@pytest.mark.parametrize(
    "arrange",
    [lambda t: t.transpose(0, 1), lambda t: t[:, :-1], lambda t: t[0].t(), lambda t: t[:1, :1].expand(3, 4, -1)],
    ids=["transposed", "shifted", "columns", "expanded"],
)
@pytest.mark.parametrize("ignored", [False, True])
def test_non_contiguous_hidden_states_and_labels_are_exact(arrange: Callable[[Tensor], Tensor], ignored: bool) -> None:
    hidden = arrange(torch.randn(3, D, D, dtype=torch.float64)).detach().requires_grad_()
    assert not hidden.is_contiguous()
    weight = torch.randn(D, V, dtype=torch.float64).t().detach().requires_grad_()
    labels = torch.randint(V, (*hidden.shape[:-1][::-1],)).permute(*range(hidden.dim() - 2, -1, -1))
    if ignored:
        labels[1:2] = -100
    loss = reference(hidden, weight, labels)
    expected = torch.autograd.grad(loss, [hidden, weight])
    mini = linear_cross_entropy(hidden, weight, labels, num_chunks=3)
    assert_close(torch.autograd.grad(mini, [hidden, weight]), expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_labels_of_any_integer_dtype_are_class_indices(dtype: torch.dtype, weighted: bool) -> None:
    hidden, weight, labels = make()
    class_weights = torch.rand(V, dtype=torch.float64) if weighted else None
    mini = linear_cross_entropy(hidden, weight, labels.to(dtype), num_chunks=3, class_weights=class_weights)
    assert_close(mini, reference(hidden, weight, labels, class_weights=class_weights), 1e-10)


@pytest.mark.parametrize("ignore_index", [0, 3, V - 1, -1, 255])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_any_ignore_index_is_obeyed(ignore_index: int, reduction: str) -> None:
    hidden, weight, labels = make()
    labels[0, 1:4] = ignore_index
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": 0.1}
    loss = reference(hidden, weight, labels, **options)
    mini = linear_cross_entropy(hidden, weight, labels, num_chunks=3, **options)
    assert_close(mini, loss, 1e-10)
    expected = torch.autograd.grad(loss.sum(), [hidden, weight])
    assert_close(torch.autograd.grad(mini.sum(), [hidden, weight]), expected, 1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_all_labels_ignored_gives_what_cross_entropy_gives_and_keeps_a_graph(reduction: str, weighted: bool) -> None:
    hidden, weight, labels = make()
    labels.fill_(-100)
    options = {"reduction": reduction, "class_weights": torch.rand(V, dtype=torch.float64) if weighted else None}
    loss = reference(hidden, weight, labels, **options)
    mini, correct = linear_cross_entropy(hidden, weight, labels, num_chunks=3, return_num_correct=True, **options)
    assert torch.equal(mini.isnan(), loss.isnan())
    assert torch.equal(mini.nan_to_num(), loss.nan_to_num())
    assert mini.requires_grad
    grads = torch.autograd.grad(mini.sum(), [hidden, weight])
    assert_close(grads, [torch.zeros_like(hidden), torch.zeros_like(weight)], 0.0)
    assert correct.item() == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_tokens_at_all_give_what_cross_entropy_gives(reduction: str) -> None:
    hidden, weight, labels = make(shape=(0, 4))
    loss = reference(hidden, weight, labels, reduction=reduction)
    mini = linear_cross_entropy(hidden, weight, labels, num_chunks=3, reduction=reduction)
    assert torch.equal(mini.isnan(), loss.isnan())
    assert torch.equal(mini.nan_to_num(), loss.nan_to_num())
    assert torch.autograd.grad(mini, hidden)[0].shape == hidden.shape


def test_extreme_logits_stay_finite_and_exact() -> None:
    hidden, weight, labels = make(torch.float32)
    with torch.no_grad():
        hidden.mul_(3e4)
    loss = reference(hidden, weight, labels)
    assert_close(linear_cross_entropy(hidden, weight, labels, num_chunks=3), loss, 1e-5)


# --- z-loss and accuracy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("logits_fn", ["plain", "soft-capped"])
def test_z_loss_is_the_squared_log_sum_exp_of_every_live_token(
    reduction: str, smoothing: float, logits_fn: str
) -> None:
    hidden, weight, labels = make()
    labels[0, ::2] = -100
    fn, live = LOGITS_FNS[logits_fn], labels != -100
    logits = F.linear(hidden, weight) if fn is None else fn(F.linear(hidden, weight))
    each = (
        F.cross_entropy(logits.view(-1, V), labels.view(-1), reduction="none", label_smoothing=smoothing).view(
            labels.shape
        )
        + 0.3 * logits.logsumexp(-1).square() * live
    )
    loss = {"mean": each.sum() / live.sum(), "sum": each.sum(), "none": each}[reduction]
    incoming = torch.randn_like(loss)
    expected = torch.autograd.grad(loss, [hidden, weight], incoming)
    mini = linear_cross_entropy(
        hidden, weight, labels, num_chunks=3, z_loss=0.3, reduction=reduction, label_smoothing=smoothing, logits_fn=fn
    )
    assert_close(mini, loss, 1e-10)
    assert_close(torch.autograd.grad(mini, [hidden, weight], incoming), expected, 1e-10)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_the_number_of_correct_tokens_is_that_of_the_arg_max(reduction: str, needs_grad: bool) -> None:
    hidden, weight, labels = make()
    guess = F.linear(hidden, weight).argmax(-1)
    labels[0] = guess[0]
    labels[0, :2] = -100
    expected = (guess == labels).sum()
    assert 5 <= expected < B * S
    with torch.set_grad_enabled(needs_grad):
        loss, correct = linear_cross_entropy(
            hidden, weight, labels, num_chunks=3, return_num_correct=True, reduction=reduction
        )
    assert correct.dtype == torch.int64
    assert correct.item() == expected
    assert not correct.requires_grad
    assert loss.requires_grad == needs_grad


# --- the incoming gradient ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [8, 0.3, -1.0, 0.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_scaled_loss_scales_every_gradient(factor: float, reduction: str) -> None:
    hidden, weight, labels = make()
    expected = torch.autograd.grad(reference(hidden, weight, labels, reduction=reduction) * factor, [hidden, weight])
    mini = linear_cross_entropy(hidden, weight, labels, num_chunks=3, reduction=reduction)
    (mini * factor).backward()
    assert_close([hidden.grad, weight.grad], expected, 1e-10)


def test_four_accumulation_steps_add_up() -> None:
    _, weight, _ = make()
    twin = weight.detach().clone().requires_grad_()
    for step in range(4):
        hidden, _, labels = make(shape=(2, 4 + step))
        labels[0, :step] = -100
        (reference(hidden, weight, labels) / 4).backward()
        (linear_cross_entropy(hidden, twin, labels, num_chunks=3) / 4).backward()
    assert_close(twin.grad, weight.grad, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_retain_graph_gives_the_same_gradients_again(reduction: str, dtype: torch.dtype) -> None:
    hidden, weight, labels = make(dtype)
    loss = linear_cross_entropy(hidden, weight, labels, num_chunks=3, reduction=reduction).sum() * 0.3
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    third = torch.autograd.grad(loss, [hidden, weight])
    assert_close(first, kept, 0.0)
    assert_close(second, kept, 0.0)
    assert_close(third, kept, 0.0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, [hidden, weight])


def test_two_losses_on_the_same_tensors_add_up() -> None:
    hidden, weight, labels = make()
    other = torch.randint(V, labels.shape)
    expected = torch.autograd.grad(reference(hidden, weight, labels) + 2 * reference(hidden, weight, other), weight)
    mini = linear_cross_entropy(hidden, weight, labels, num_chunks=3)
    mini = mini + 2 * linear_cross_entropy(hidden, weight, other, num_chunks=2)
    assert_close(torch.autograd.grad(mini, weight), expected, 1e-10)


def test_a_tied_weight_gets_the_sum_of_both_gradients() -> None:
    _, weight, labels = make()
    ids = torch.randint(V, labels.shape)

    def loss(of: Callable[..., Tensor], **options: Any) -> Tensor:
        return of(torch.tanh(F.embedding(ids, weight)), weight, labels, **options)

    expected = torch.autograd.grad(loss(reference), weight)
    assert_close(torch.autograd.grad(loss(linear_cross_entropy, num_chunks=3), weight), expected, 1e-10)


def test_a_second_derivative_is_refused() -> None:
    """Silence would be a gradient penalty that has no effect."""
    hidden, weight, labels = make()
    loss = linear_cross_entropy(hidden, weight, labels, num_chunks=3)

    def penalized() -> None:
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        (loss + grad.square().sum()).backward()

    with pytest.raises(RuntimeError, match=r"once_differentiable|create_graph|second derivative"):
        penalized()


def test_a_second_derivative_through_the_incoming_gradient_is_refused() -> None:
    hidden, weight, labels = make()
    loss = linear_cross_entropy(hidden, weight, labels, num_chunks=3).square()

    def penalized() -> None:
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        grad.sum().backward()

    with pytest.raises(RuntimeError, match=r"once_differentiable|create_graph|second derivative"):
        penalized()


# --- who gets a gradient ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [("hidden",), ("weight",), ("bias",), ("hidden", "weight"), ("weight", "bias")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_tensors_get_no_gradient_and_the_others_the_right_one(frozen: tuple[str, ...], reduction: str) -> None:
    hidden, weight, labels = make()
    tensors = {"hidden": hidden, "weight": weight, "bias": torch.randn(V, dtype=torch.float64, requires_grad=True)}
    for name in frozen:
        tensors[name].requires_grad_(False)
    trained = {name: t for name, t in tensors.items() if name not in frozen}
    loss = reference(hidden, weight, labels, bias=tensors["bias"], reduction=reduction).square().sum()
    expected = torch.autograd.grad(loss, list(trained.values()))
    mini = linear_cross_entropy(hidden, weight, labels, bias=tensors["bias"], num_chunks=3, reduction=reduction)
    mini.square().sum().backward()
    assert_close([t.grad for t in trained.values()], expected, 1e-10)
    assert all(tensors[name].grad is None for name in frozen)


def test_nothing_to_train_means_no_graph() -> None:
    hidden, weight, labels = make()
    assert not linear_cross_entropy(hidden.detach(), weight.detach(), labels, num_chunks=3).requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("logits_fn", ["plain", "soft-capped"])
def test_without_gradients_the_loss_is_right_and_has_no_graph(
    mode: Callable[[], Any], reduction: str, logits_fn: str
) -> None:
    hidden, weight, labels = make()
    options = {"reduction": reduction, "logits_fn": LOGITS_FNS[logits_fn]}
    with mode():
        loss = linear_cross_entropy(hidden, weight, labels, num_chunks=3, **options)
        assert_close(loss, reference(hidden, weight, labels, **options), 1e-10)
    assert not loss.requires_grad


def test_inputs_keep_their_values() -> None:
    hidden, weight, labels = make()
    before = [t.detach().clone() for t in (hidden, weight, labels)]
    linear_cross_entropy(hidden, weight, labels, num_chunks=3).backward()
    assert all(torch.equal(t, b) for t, b in zip((hidden, weight, labels), before, strict=True))


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_tensors_changed_before_backward_are_noticed_where_backward_needs_them(which: str) -> None:
    hidden, weight, labels = make()
    loss = linear_cross_entropy(hidden, weight, labels, num_chunks=3, reduction="none")
    with torch.no_grad():
        {"hidden": hidden, "weight": weight}[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


# --- half precision and autocast ----------------------------------------------------------------------------------


def half_loss(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """What transformers does: half-precision logits, fp32 loss."""
    return reference(hidden, weight, labels, logits_fn=lambda logits: logits.float(), **options)


@pytest.mark.parametrize(("tokens", "num_chunks"), [(64, 1), (64, 4), (512, 16), (512, 256)])
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bf16_loss_and_gradients_are_as_near_to_the_truth_as_of_fp32_cross_entropy_on_bf16_logits(
    autocast: bool, tokens: int, num_chunks: int, reduction: str
) -> None:
    errors = {"plain": [0.0, 0.0], "mini": [0.0, 0.0]}
    for seed in range(4):
        torch.manual_seed(seed)
        hidden, weight, labels = make(torch.float32 if autocast else torch.bfloat16, (2, tokens // 2), d=32, v=64)
        labels[0, ::5] = -100
        exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        truth = reference(*exact, labels, reduction=reduction)
        true_grads = torch.autograd.grad(truth.sum(), exact)
        for name in errors:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                if name == "plain":
                    loss = half_loss(hidden, weight, labels, reduction=reduction)
                else:
                    loss = linear_cross_entropy(hidden, weight, labels, num_chunks=num_chunks, reduction=reduction)
            assert loss.dtype == torch.float32
            grads = torch.autograd.grad(loss.sum(), [hidden, weight])
            assert [g.dtype for g in grads] == [hidden.dtype, weight.dtype]
            errors[name][0] += distance(loss, truth)
            errors[name][1] += total_distance(grads, true_grads)
    assert errors["mini"][0] <= 1.1 * errors["plain"][0]
    assert errors["mini"][1] <= 1.1 * errors["plain"][1]


def test_the_autocast_state_of_the_forward_pass_counts_for_the_backward_pass() -> None:
    hidden, weight, labels = make(torch.float32)
    inside = linear_cross_entropy(hidden, weight, labels, num_chunks=3, reduction="none")
    expected = torch.autograd.grad(inside.sum(), [hidden, weight], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(torch.autograd.grad(inside.sum(), [hidden, weight]), expected, 0.0)
        loss = linear_cross_entropy(hidden, weight, labels, num_chunks=3, reduction="none")
        expected = torch.autograd.grad(loss.sum(), [hidden, weight], retain_graph=True)
    assert_close(torch.autograd.grad(loss.sum(), [hidden, weight]), expected, 0.0)


def test_a_weight_used_again_in_the_same_autocast_block_keeps_that_gradient() -> None:
    hidden, weight, labels = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(hidden, weight, labels, num_chunks=3)
        y = F.linear(hidden, weight)
    (grad,) = torch.autograd.grad(y.float().sum(), [weight])
    assert_close(grad, hidden.detach().sum((0, 1)).expand(V, D), 2e-2)


@pytest.mark.parametrize("num_chunks", [1, 3, 32])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fp16_gradients_survive_a_loss_scale_of_65536(num_chunks: int, reduction: str) -> None:
    errors = {"plain": 0.0, "mini": 0.0}
    scale = 65536.0 / (64 if reduction == "none" else 1)
    for seed in range(4):
        torch.manual_seed(seed)
        hidden, weight, labels = make(torch.float16, (2, 32), d=16, v=64)
        exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        truth = torch.autograd.grad(reference(*exact, labels, reduction=reduction).sum() * scale, exact)
        for name in errors:
            if name == "plain":
                loss = half_loss(hidden, weight, labels, reduction=reduction)
            else:
                loss = linear_cross_entropy(hidden, weight, labels, num_chunks=num_chunks, reduction=reduction)
            grads = torch.autograd.grad(loss.sum() * scale, [hidden, weight])
            assert all(g.dtype == torch.float16 and g.isfinite().all() for g in grads)
            errors[name] += total_distance(grads, truth)
    assert errors["mini"] <= 1.1 * errors["plain"]


def test_fp16_gradients_of_many_tokens_do_not_underflow() -> None:
    """A mean over many tokens makes each token's gradient smaller than fp16 can hold, until the loss scale lifts it."""
    hidden, weight, labels = make(torch.float16, (2, 2048), d=4, v=8)
    with torch.no_grad():
        weight.mul_(0.01)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    truth = torch.autograd.grad(reference(*exact, labels) * 65536, exact)
    loss = linear_cross_entropy(hidden, weight, labels, num_chunks=8)
    assert total_distance(torch.autograd.grad(loss * 65536, [hidden, weight]), truth) < 5e-3


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(B, S - 1), (B * S,), (B, S, 1), (S, B), ()], ids=str)
def test_labels_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    hidden, weight, _ = make()
    with pytest.raises(ValueError, match=r"labels must have one entry per token, shape \(2, 7\)"):
        linear_cross_entropy(hidden, weight, torch.zeros(shape, dtype=torch.int64), num_chunks=3)


@pytest.mark.parametrize("label", [V, V + 5, -1, -99, -101])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_label_out_of_range_is_refused_by_value_and_range(label: int, reduction: str) -> None:
    hidden, weight, labels = make()
    labels[0, 0] = -100
    labels[1, 2] = label
    with pytest.raises(IndexError) as error:
        linear_cross_entropy(hidden, weight, labels, num_chunks=3, reduction=reduction)
    for part in (f"Label {label} ", f"from 0 to {V - 1}", "ignore_index=-100"):
        assert part in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64], ids=str)
def test_labels_that_are_no_indices_are_refused(dtype: torch.dtype) -> None:
    hidden, weight, labels = make()
    with pytest.raises(ValueError, match="integer class indices"):
        linear_cross_entropy(hidden, weight, labels.to(dtype), num_chunks=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "average"}, "'average'"),
        ({"reduction": None}, "reduction must be"),
        ({"label_smoothing": -0.1}, "-0.1"),
        ({"label_smoothing": 1.5}, "1.5"),
        ({"label_smoothing": float("nan")}, "nan"),
        ({"bias": torch.zeros(V - 1)}, "bias must have shape"),
        ({"class_weights": torch.zeros(V + 1)}, "class_weights must have shape"),
        ({"num_chunks": 0}, "num_chunks"),
        ({"num_chunks": None}, "exactly one"),
        ({"chunk_tokens": 3}, "exactly one"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    hidden, weight, labels = make()
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, labels, **{"num_chunks": 3, **options})


@pytest.mark.parametrize("shape", [(V, D + 1), (D, V), (D,), (1, V, D)], ids=str)
def test_a_weight_that_does_not_fit_the_hidden_states_is_refused(shape: tuple[int, ...]) -> None:
    hidden, _, labels = make()
    with pytest.raises(ValueError, match="must share D"):
        linear_cross_entropy(hidden, torch.zeros(shape, dtype=torch.float64), labels, num_chunks=3)


# --- matmuls ------------------------------------------------------------------------------------------------------


def passes(
    *, ignored: bool = False, reduction: str = "mean", grads: bool = True, frozen: str = "", **options: Any
) -> float:
    """Matmul work of forward and backward in units of one product of all tokens with the weight."""
    hidden, weight, labels = make(torch.float32, (2, 12))
    if ignored:
        labels[:, ::2] = -100
    if frozen:
        {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    with Matmuls() as counter, torch.set_grad_enabled(grads):
        loss = linear_cross_entropy(hidden, weight, labels, num_chunks=5, reduction=reduction, **options)
        if grads:
            loss.sum().backward()
    return counter.multiply_adds / (24 * V * D)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 3),
        ({"reduction": "sum"}, 3),
        ({"bias": torch.zeros(V)}, 3),
        ({"logits_fn": LOGITS_FNS["soft-capped"]}, 3),
        ({"frozen": "weight"}, 2),
        ({"frozen": "hidden"}, 2),
        ({"grads": False}, 1),
        ({"reduction": "none"}, 4),
        ({"reduction": "none", "frozen": "weight"}, 3),
        ({"reduction": "none", "grads": False}, 1),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else str(value),
)
@pytest.mark.parametrize("ignored", [False, True], ids=["all live", "half ignored"])
def test_matmul_passes_are_three_with_gradients_and_ignored_tokens_cost_none(
    options: dict[str, Any], expected: int, ignored: bool
) -> None:
    assert passes(ignored=ignored, **options) == expected / (2 if ignored else 1)


# --- bytes --------------------------------------------------------------------------------------------------------

WIDE_V, WIDE_D, CHUNK = 8192, 48, 96


def peak_bytes(
    dtype: torch.dtype, tokens: int, logits_fn: Callable[[Tensor], Tensor] | None, *, plain: bool = False
) -> int:
    hidden, weight, labels = make(dtype, (1, tokens), d=WIDE_D, v=WIDE_V)
    with TensorBytes([hidden, weight, labels]) as memory:
        if plain:
            reference(hidden, weight, labels, logits_fn=logits_fn).backward()
        else:
            linear_cross_entropy(hidden, weight, labels, chunk_tokens=CHUNK, logits_fn=logits_fn).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return memory.peak


# Half-precision weights: dW is held in fp32 over several chunks and converted at the end, when both exist and the
# logits are gone; with chunks of at least D tokens the converted copy fits where the logits were.
MEMORY_CASES = [
    pytest.param(dtype, capped, id=f"{dtype}, {capped}")
    for dtype in (torch.float32, torch.bfloat16)
    for capped in ("plain", "soft-capped")
]


def gradient_bytes(dtype: torch.dtype, tokens: int) -> int:
    return tokens * WIDE_D * dtype.itemsize + WIDE_V * WIDE_D * 4


@pytest.mark.parametrize(("dtype", "capped"), MEMORY_CASES)
def test_the_peak_is_the_gradients_and_little_more_than_one_chunk_of_logits(dtype: torch.dtype, capped: str) -> None:
    assert CHUNK >= WIDE_D
    chunk_bytes = CHUNK * WIDE_V * dtype.itemsize
    peak = peak_bytes(dtype, 480, LOGITS_FNS[capped])
    assert peak <= gradient_bytes(dtype, 480) + 1.2 * chunk_bytes
    # And the measure sees what there is to save: the unmodified loss holds all logits at least twice.
    assert peak_bytes(dtype, 480, LOGITS_FNS[capped], plain=True) > 2 * 5 * chunk_bytes


@pytest.mark.parametrize(("dtype", "capped"), MEMORY_CASES)
def test_the_peak_grows_with_the_sequence_by_the_gradient_of_the_hidden_states_only(
    dtype: torch.dtype, capped: str
) -> None:
    short, long = (peak_bytes(dtype, tokens, LOGITS_FNS[capped]) for tokens in (480, 960))
    # Beside it a few numbers per token: its loss, its label and which tokens are live.
    assert long - short <= gradient_bytes(dtype, 960) - gradient_bytes(dtype, 480) + 480 * 32
