from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ops_tools import B, D, Head, Matmuls, S, V, assert_close, leaves_of
from torch import Tensor, nn

from lightning_mst.ops import LinearHead
from lightning_mst.ops.deferred_logits import DeferredLogits, DeferredLogitsWarning, defer_logits


def ce(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits, labels, **options)


def parts_ce(logits: Iterable[Tensor], labels: Iterable[Tensor]) -> Tensor:
    pairs = zip(logits, labels, strict=True)
    return sum(ce(part.reshape(-1, V), of_part.reshape(-1), reduction="sum") for part, of_part in pairs)


def flat_ce(logits: Tensor, labels: Tensor) -> Tensor:
    return ce(logits.view(-1, V), labels.reshape(-1))


def in_place(write: Callable[[Tensor], object]) -> Callable[[Tensor, Tensor], Tensor]:
    def use(logits: Tensor, labels: Tensor) -> Tensor:
        write(logits)
        return flat_ce(logits, labels)

    return use


def divided(logits: Tensor, labels: Tensor) -> Tensor:
    logits /= 2.0
    return flat_ce(logits, labels)


def copy_then_write(logits: Tensor, labels: Tensor) -> Tensor:
    twice = logits * 2.0
    logits.div_(4.0)
    return flat_ce(twice, labels) + flat_ce(logits, labels)


def scaled_by_augmented(logits: Tensor, labels: Tensor) -> Tensor:
    logits *= 2.0
    logits += 0.5
    logits -= 0.25
    return flat_ce(logits, labels)


def causal(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(logits, labels, vocab_size=V, **options)


def live(labels: Tensor) -> Tensor:
    return labels != -100


CLASS_WEIGHTS = torch.linspace(0.2, 1.2, V, dtype=torch.float64)

SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "view(-1, V)": flat_ce,
    "view with named size": lambda x, y: ce(x.view(size=(B * S, V)), y.view(-1)),
    "view(B * S, -1)": lambda x, y: ce(x.view(B * S, -1), y.view(-1)),
    "reshape": lambda x, y: ce(x.reshape(-1, x.size(-1)), y.reshape(-1)),
    "torch.reshape": lambda x, y: ce(torch.reshape(x, (-1, V)), y.reshape(-1)),
    "flatten": lambda x, y: ce(x.flatten(0, 1), y.flatten()),
    "torch.flatten": lambda x, y: ce(torch.flatten(x, end_dim=1), y.flatten()),
    "torch.flatten by keyword": lambda x, y: ce(torch.flatten(input=x, end_dim=1), y.flatten()),
    "contiguous": lambda x, y: ce(x[..., :-1, :].contiguous().view(-1, V), y[..., 1:].contiguous().view(-1)),
    "unflatten": lambda x, y: ce(x.flatten(0, 1).unflatten(0, (S, B)).view(-1, V), y.view(-1)),
    "squeeze and unsqueeze": lambda x, y: ce(x.unsqueeze(1).squeeze(1).view(-1, V), y.view(-1)),
    "[..., :-1, :]": lambda x, y: ce(x[..., :-1, :].reshape(-1, V), y[..., 1:].reshape(-1)),
    "[:, :-1]": lambda x, y: ce(x[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1)),
    "[:, :-1, :]": lambda x, y: ce(x[:, :-1, :].flatten(0, 1), y[:, 1:].flatten()),
    "[:, 1::2]": lambda x, y: ce(x[:, 1::2].reshape(-1, V), y[:, 1::2].reshape(-1)),
    "[1]": lambda x, y: ce(x[1], y[1]),
    "[-1, 2]": lambda x, y: ce(x[-1, 2], y[-1, 2]),
    "[:, -1]": lambda x, y: ce(x[:, -1], y[:, -1]),
    "[None]": lambda x, y: ce(x[None].view(-1, V), y.view(-1)),
    "[...]": lambda x, y: ce(x[...].view(-1, V), y.view(-1)),
    "[..., :]": lambda x, y: ce(x[..., :].view(-1, V), y.view(-1)),
    "mask": lambda x, y: ce(x[live(y)], y[live(y)]),
    "mask, all": lambda x, y: ce(x[live(y), :], y[live(y)]),
    "mask of positions": lambda x, y: ce(x[:, live(y[0])].flatten(0, 1), y[:, live(y[0])].flatten()),
    "indices": lambda x, y: ce(x[torch.tensor([1, 0, 1]), torch.tensor([2, 3, 4])], y[[1, 0, 1], [2, 3, 4]]),
    "list": lambda x, y: ce(x[[1, 0]].view(-1, V), y[[1, 0]].view(-1)),
    "numpy index": lambda x, y: ce(x[:, np.array([1, 3])].view(-1, V), y[:, [1, 3]].reshape(-1)),
    "transpose(1, 2)": lambda x, y: ce(x.transpose(1, 2), y),
    "transpose(-1, -2)": lambda x, y: ce(x.transpose(-1, -2), y),
    "torch.transpose by keyword": lambda x, y: ce(torch.transpose(x, dim0=1, dim1=2), y),
    "swapaxes": lambda x, y: ce(x.swapaxes(1, 2), y),
    "permute": lambda x, y: ce(x.permute(0, 2, 1), y),
    "permute all": lambda x, y: ce(x.permute(1, 2, 0), y.t()),
    "movedim": lambda x, y: ce(x.movedim(-1, 1), y),
    "torch.movedim": lambda x, y: ce(torch.movedim(x, 2, 1), y),
    "transpose there and back": lambda x, y: ce(x.transpose(0, 1).transpose(0, 1).reshape(-1, V), y.reshape(-1)),
    "time first": lambda x, y: ce(x.transpose(0, 1).reshape(-1, V), y.t().reshape(-1)),
    "chunk": lambda x, y: parts_ce(x.chunk(2, dim=1), y.chunk(2, 1)),
    "torch.chunk": lambda x, y: parts_ce(torch.chunk(x, 2), y.chunk(2)),
    "split": lambda x, y: parts_ce(x.split(2, 1), y.split(2, 1)),
    "split by sizes": lambda x, y: parts_ce(x.split([1, 4], dim=1), y.split([1, 4], 1)),
    "torch.split by keyword": lambda x, y: parts_ce(torch.split(x, split_size_or_sections=2, dim=1), y.split(2, 1)),
    "unbind": lambda x, y: parts_ce(x.unbind(), y.unbind()),
    "unbind over positions": lambda x, y: parts_ce(torch.unbind(x, dim=1), y.unbind(1)),
    "iteration": lambda x, y: parts_ce(x, y),
    "select": lambda x, y: ce(x.select(1, -1), y.select(1, -1)),
    "narrow": lambda x, y: ce(x.narrow(1, 1, 3).flatten(0, 1), y.narrow(1, 1, 3).flatten()),
    "index_select": lambda x, y: ce(x.index_select(1, torch.tensor([3, 1])).flatten(0, 1), y[:, [3, 1]].flatten()),
    "clone": lambda x, y: flat_ce(x.clone(), y),
    "two views": lambda x, y: flat_ce(x, y) + ce(x[:, -1], y[:, -1], reduction="sum"),
}  # fmt: skip

POINTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "double": lambda x, y: flat_ce(x.double(), y),
    "to(float64)": lambda x, y: flat_ce(x.to(torch.float64), y),
    "to(device)": lambda x, y: flat_ce(x.to("cpu"), y),
    "type_as": lambda x, y: flat_ce(x.type_as(torch.zeros(1, dtype=torch.float64)), y),
    "* scalar": lambda x, y: flat_ce(x * 0.3, y),
    "scalar *": lambda x, y: flat_ce(0.3 * x, y),
    "* 0-d tensor": lambda x, y: flat_ce(x * torch.tensor(0.3, dtype=torch.float64), y),
    "* numpy scalar": lambda x, y: flat_ce(x * np.float64(0.3), y),
    "/ scalar": lambda x, y: flat_ce(x / 3, y),
    "+ scalar": lambda x, y: flat_ce(x + 1.5, y),
    "scalar - logits": lambda x, y: flat_ce(1.0 - x, y),
    "negated": lambda x, y: flat_ce(-x, y),
    "torch.mul": lambda x, y: flat_ce(torch.mul(x, 0.3), y),
    "torch.mul by keyword": lambda x, y: flat_ce(torch.mul(input=x, other=0.3), y),
    "torch.div": lambda x, y: flat_ce(torch.div(x, 3.0), y),
    "torch.add with alpha": lambda x, y: flat_ce(torch.add(x, 2.0, alpha=3), y),
    "clamp": lambda x, y: flat_ce(x.clamp(min=-1.0, max=1.5), y),
    "soft-cap": lambda x, y: flat_ce(torch.tanh(x / 2.0) * 2.0, y),
    "soft-cap after a view": lambda x, y: ce((x.view(-1, V) / 2.0).tanh() * 2.0, y.view(-1)),
    "soft-cap with channels first": lambda x, y: ce(F.tanh(x.transpose(1, 2) / 2.0) * 2.0, y),
    "div_": in_place(lambda x: x.div_(2.0)),
    "mul_": in_place(lambda x: x.mul_(2.0)),
    "add_": in_place(lambda x: x.add_(2.0).mul_(0.5)),
    "div_, tanh_": in_place(lambda x: x.div_(2.0).tanh_()),
    "/=": divided,
    "*=, +=, -=": scaled_by_augmented,
    "clone, then in place": lambda x, y: flat_ce(x.clone().mul_(3.0), y) + flat_ce(x, y),
"copy keeps its values after a write": copy_then_write,
}  # fmt: skip

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda x, y: ce(x.view(-1, V), y.view(-1), reduction="sum"),
    "none": lambda x, y: ce(x.view(-1, V), y.view(-1), reduction="none"),
    "none with channels first": lambda x, y: ce(x.transpose(1, 2), y, reduction="none"),
    "label smoothing": lambda x, y: ce(x.view(-1, V), y.view(-1), label_smoothing=0.1),
    "weight": lambda x, y: ce(x.view(-1, V), y.view(-1), weight=CLASS_WEIGHTS),
    "weight and smoothing": lambda x, y: ce(x.view(-1, V), y.view(-1), weight=CLASS_WEIGHTS, label_smoothing=0.1),
    "ignore_index": lambda x, y: ce(x.view(-1, V), y.view(-1).clamp(min=0), ignore_index=0),
    "by keyword": lambda x, y: F.cross_entropy(input=x.view(-1, V), target=y.view(-1)),
    "module": lambda x, y: nn.CrossEntropyLoss()(x.view(-1, V), y.view(-1)),
    "module with options": lambda x, y: nn.CrossEntropyLoss(
        weight=CLASS_WEIGHTS, ignore_index=1, reduction="sum", label_smoothing=0.2
    )(x.transpose(1, 2), y.clamp(min=1)),
    "two losses": lambda x, y: flat_ce(x, y) + 2 * ce(x.view(-1, V), y.view(-1).clamp(min=3), reduction="sum"),
}  # fmt: skip

IN_FP32: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "float": lambda x, y: flat_ce(x.float(), y),
    "to(float32)": lambda x, y: flat_ce(x.to(torch.float32), y),
    "to(dtype=float32)": lambda x, y: flat_ce(x.to(dtype=torch.float32), y),
    "ForCausalLMLoss": causal,
    "ForCausalLMLoss with num_items_in_batch": lambda x, y: causal(x, y, num_items_in_batch=torch.tensor(7)),
    "ForCausalLMLoss with an int": lambda x, y: causal(x, y, num_items_in_batch=7),
    "ForCausalLMLoss with shift_labels": lambda x, y: causal(x, None, shift_labels=y),
    "ForCausalLMLoss after a soft-cap": lambda x, y: causal(torch.tanh(x / 2.0) * 2.0, y),
}  # fmt: skip


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("use", [*SHAPES, *POINTWISE, *LOSSES])
def test_a_loss_on_deferred_logits_is_exact_and_never_makes_them_real(use: str, bias: bool, never_real: None) -> None:
    head, run = Head(bias=bias), {**SHAPES, **POINTWISE, **LOSSES}[use]
    loss, expected = head.outcome(run, head.plain())
    logits = head.deferred()
    mini_loss, grads = head.outcome(run, logits)
    assert_close(mini_loss, loss, 1e-10, "loss")
    assert_close(grads, expected, 1e-10, "gradient")
    assert logits._real is None


@pytest.mark.parametrize("use", IN_FP32)
def test_a_loss_in_fp32_on_fp64_logits_is_exact_to_fp32(use: str, never_real: None) -> None:
    head = Head()
    loss, expected = head.outcome(IN_FP32[use], head.plain())
    logits = head.deferred()
    mini_loss, grads = head.outcome(IN_FP32[use], logits)
    assert_close(mini_loss, loss, 1e-6, "loss")
    assert_close(grads, expected, 1e-6, "gradient")
    assert logits._real is None


@pytest.mark.parametrize("use", [*SHAPES, *POINTWISE])
def test_what_reaches_the_loss_looks_like_plain_logits(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head, original = Head(), ce
    seen: list[tuple[Any, ...]] = []

    def spy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
        seen.append((tuple(logits.shape), logits.dtype, logits.requires_grad, logits.dim(), logits.numel()))
        return original(logits, labels, **options)

    monkeypatch.setitem(globals(), "ce", spy)
    {**SHAPES, **POINTWISE}[use](head.plain(), head.labels)
    expected, seen[:] = list(seen), []
    assert expected
    {**SHAPES, **POINTWISE}[use](head.deferred(), head.labels)
    assert seen == expected


@pytest.mark.parametrize("lead", [(), (4,), (2, 2, 3)], ids=str)
def test_hidden_states_of_any_rank_are_exact(lead: tuple[int, ...], never_real: None) -> None:
    head = Head(lead=lead)
    head.labels.clamp_(min=0)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return ce(logits, labels) if not lead else ce(logits.reshape(-1, V), labels.reshape(-1))

    expected = head.outcome(loss, head.plain())
    result = head.outcome(loss, head.deferred())
    assert_close(result[0], expected[0], 1e-10)
    assert_close(result[1], expected[1], 1e-10)


@pytest.mark.parametrize("split", [{"num_chunks": 1}, {"num_chunks": 99}, {"chunk_tokens": 3}])
def test_any_split_is_exact(split: dict[str, int], never_real: None) -> None:
    head = Head()
    expected = head.outcome(flat_ce, head.plain())
    result = head.outcome(flat_ce, defer_logits(head.hidden, LinearHead(head.weight, head.bias), split=split))
    assert_close(result[0], expected[0], 1e-10)
    assert_close(result[1], expected[1], 1e-10)


@pytest.mark.parametrize("num_chunks", [1, 4, 99])
@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.argmax(-1),
        lambda x: x.argmax(dim=-1),
        lambda x: torch.argmax(x, dim=2),
        lambda x: torch.argmax(input=x, dim=2),
        lambda x: x.argmax(axis=-1),
        lambda x: x.argmax(-1, keepdim=True),
        lambda x: x.transpose(1, 2).argmax(1),
        lambda x: x.transpose(1, 2).argmax(1, keepdim=True),
        lambda x: x[:, :-1].argmax(-1),
        lambda x: x.view(-1, V).argmax(1),
        lambda x: (-x).argmax(-1),
        lambda x: x.detach().argmax(-1),
    ],
    ids=[
        "positional", "keyword", "torch.argmax", "torch.argmax by keyword", "axis", "keepdim", "channels first",
        "channels first, keepdim", "shifted", "flat", "negated", "detached",
    ],
)  # fmt: skip
def test_arg_max_over_the_vocabulary_walks_chunks(
    ask: Callable[[Tensor], Tensor], num_chunks: int, never_real: None
) -> None:
    head = Head()
    result = ask(head.deferred(num_chunks))
    assert torch.equal(result, ask(head.plain()))
    assert not isinstance(result, DeferredLogits)
    assert not result.requires_grad


@pytest.mark.parametrize("dim", [0, 1, None])
def test_arg_max_over_other_dimensions_is_right(dim: int | None) -> None:
    head = Head()
    with pytest.warns(DeferredLogitsWarning, match="argmax"):
        assert torch.equal(head.deferred().argmax(dim), head.plain().argmax(dim))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("use", ["view(-1, V)", "mask", "soft-cap", "none", "weight and smoothing", "div_"])
def test_without_gradients_the_loss_is_right_and_has_no_graph(
    use: str, mode: Callable[[], Any], never_real: None
) -> None:
    head, run = Head(), {**SHAPES, **POINTWISE, **LOSSES}[use]
    with mode():
        logits = head.deferred()
        assert not logits.requires_grad
        assert logits.grad_fn is None
        loss = run(logits, head.labels)
        assert_close(loss, run(head.plain(), head.labels), 1e-10)
    assert not loss.requires_grad


def test_the_loss_under_no_grad_of_logits_with_a_graph_has_none(never_real: None) -> None:
    head = Head()
    logits = head.deferred()
    with torch.no_grad():
        assert not flat_ce(logits, head.labels).requires_grad
    assert flat_ce(logits, head.labels).requires_grad


@pytest.mark.parametrize(
    "take",
    [lambda x: x.detach(), lambda x: torch.detach(x), lambda x: x.detach().view(B, S, V).float() * 2],
    ids=["detach", "torch.detach", "and more"],
)
def test_a_detached_copy_has_no_graph_and_leaves_the_other_alone(
    take: Callable[[Tensor], Tensor], never_real: None
) -> None:
    head = Head()
    logits = head.deferred()
    copy_ = take(logits)
    assert not copy_.requires_grad
    loss = flat_ce(copy_, head.labels)
    assert not loss.requires_grad
    assert_close(loss, flat_ce(take(head.plain()), head.labels), 1e-6)
    assert flat_ce(logits, head.labels).requires_grad


@pytest.mark.parametrize("ask", [flat_ce, lambda x, y: x.softmax(-1)], ids=["loss", "softmax"])
@pytest.mark.parametrize("made", ["head", "scaled", "viewed"])
def test_logits_made_without_gradients_stay_so_when_used_with_gradients(
    made: str, ask: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """A teacher's logits must not train the teacher."""
    head = Head()

    def make(logits: Callable[[], Tensor]) -> Tensor:
        if made != "head":
            whole = logits()
        with torch.no_grad():
            return logits() if made == "head" else whole * 2.0 if made == "scaled" else whole.flatten(0, 1)

    plain, deferred = make(head.plain), make(head.deferred)
    # A plain view under no_grad claims to require a gradient, but its graph leads nowhere.
    assert made == "viewed" or not ask(plain, head.labels).requires_grad
    assert not deferred.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeferredLogitsWarning)
        assert not ask(deferred, head.labels).requires_grad


# --- real logits --------------------------------------------------------------------------------------------------


def written(write: Callable[[Tensor, Tensor], object]) -> Callable[[Tensor, Tensor], Tensor]:
    def use(logits: Tensor, labels: Tensor) -> Tensor:
        write(logits, labels)
        return flat_ce(logits, labels)

    return use


REAL: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "max of all": ("max", lambda x, y: x.max()),
    "cumsum": ("cumsum", lambda x, y: x.cumsum(-1)),
    "softmax over positions": ("softmax", lambda x, y: x.softmax(1)),
    "logsumexp over positions": ("logsumexp", lambda x, y: x.logsumexp(1)),
    "sort": ("sort", lambda x, y: torch.sort(x, dim=-1).values),
    "mean": ("mean", lambda x, y: x.mean((0, 1))),
    "slice of the vocabulary": ("__getitem__", lambda x, y: x[..., :4]),
    "reversed slice of all dimensions": ("__getitem__", lambda x, y: x[:, 1:, 2:5]),
    "one entry of the vocabulary": ("__getitem__", lambda x, y: x[:, :, 3]),
    "index into the vocabulary": ("__getitem__", lambda x, y: x[..., torch.tensor([1, 3])]),
    "view that splits the vocabulary": ("view", lambda x, y: x.view(-1)),
    "unsqueeze behind the vocabulary": ("unsqueeze", lambda x, y: x.unsqueeze(-1)),
    "channels first, then flat": ("reshape", lambda x, y: x.transpose(1, 2).reshape(B, -1)),
    "select from the vocabulary": ("select", lambda x, y: x.select(-1, 2)),
    "chunks of the vocabulary": ("chunk", lambda x, y: x.chunk(2, -1)[1]),
    "masked write": ("__setitem__", written(lambda x, y: x.__setitem__(y == -100, 0.5))),
    "write to the vocabulary": ("__setitem__", written(lambda x, y: x.__setitem__((Ellipsis, slice(0, 3)), -2.0))),
    "exp_": ("exp_", written(lambda x, y: x.exp_())),
    "cat": ("cat", lambda x, y: torch.cat([x, x], 1)),
    "stack": ("stack", lambda x, y: torch.stack([x, x])),
    "matmul": ("__matmul__|matmul", lambda x, y: x @ torch.linspace(-1, 1, V, dtype=x.dtype)),
    "einsum": ("einsum", lambda x, y: torch.einsum("bsv,v->bs", x, CLASS_WEIGHTS)),
    "old-style reduction": ("cross_entropy", lambda x, y: ce(x.view(-1, V), y.view(-1), size_average=False)),
    "margin loss": ("multi_margin_loss", lambda x, y: F.multi_margin_loss(x.flatten(0, 1), y.flatten().abs() % V)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize("use", REAL)
def test_anything_else_gets_real_logits_with_right_gradients_and_one_warning_that_names_it(use: str) -> None:
    name, run = REAL[use]
    head = Head()
    value, expected = head.outcome(run, head.plain())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            logits = head.deferred()
            mini_value, grads = head.outcome(run, logits)
            assert not isinstance(mini_value, DeferredLogits)
            assert_close(mini_value, value, 1e-10, "value")
            assert_close(grads, expected, 1e-10, "gradient")
    messages = [str(w.message) for w in caught if issubclass(w.category, DeferredLogitsWarning)]
    assert len(messages) == 1, messages
    assert any(messages[0].startswith(n) for n in name.split("|")) or f"{name} " in messages[0], messages[0]


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("numpy", lambda x: x.detach().numpy()),
        ("tolist", lambda x: x.tolist()),
        ("__deepcopy__", lambda x: copy.deepcopy(x.detach()).numpy()),
        ("__reduce_ex__", lambda x: pickle.loads(pickle.dumps(x.detach())).numpy()),
        ("numpy", lambda x: (x > 0).numpy()),
        ("numpy", lambda x: (x == 0).numpy()),
        ("sort", lambda x: torch.isnan(x).sort(-1).values.numpy()),
        ("equal", lambda x: torch.equal(x, x)),
        ("allclose", lambda x: torch.allclose(x, torch.zeros(B, S, V, dtype=x.dtype))),
        ("__array__", lambda x: np.asarray(x.detach())),
        ("__getitem__", lambda x: f"{x[0, 0, 0].item():.6f}"),
        ("data", lambda x: x.data.numpy()),
        ("cpu", lambda x: x.detach().cpu().numpy()),
    ],
    ids=[
        "numpy", "tolist", "deepcopy", "pickle", ">", "==", "isnan", "equal", "allclose", "asarray", "format", "data",
        "cpu",
    ],
)  # fmt: skip
def test_values_asked_for_without_a_gradient_are_right_and_warn_once(name: str, ask: Callable[[Tensor], Any]) -> None:
    head = Head()
    expected = np.asarray(ask(head.plain()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            value = np.asarray(ask(head.deferred()))
            assert value.dtype == expected.dtype
            assert np.array_equal(value, expected) if value.dtype.kind in "Ub" else np.allclose(value, expected, 1e-10)
    messages = [str(w.message) for w in caught if issubclass(w.category, DeferredLogitsWarning)]
    assert len(messages) == 1, messages
    assert messages[0].startswith(name), messages[0]


def test_torch_save_writes_plain_logits() -> None:
    head = Head()
    file = io.BytesIO()
    with pytest.warns(DeferredLogitsWarning):
        torch.save(head.deferred().detach(), file)
    file.seek(0)
    loaded = torch.load(file)
    assert type(loaded) is Tensor
    assert_close(loaded, head.plain().detach(), 1e-10)


def test_the_warning_says_how_large_the_logits_are_and_what_would_not_need_them() -> None:
    head = Head()
    with pytest.warns(DeferredLogitsWarning) as caught:
        head.deferred().cumsum(-1)
    for part in ("cumsum", f"({B}, {S}, {V})", "float64", "GiB", "cross_entropy"):
        assert part in str(caught[0].message)


def test_two_functions_that_ask_are_both_named() -> None:
    logits = Head().deferred()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits.cumsum(-1)
        Head().deferred().sort(-1)
    names = [str(w.message).split()[0] for w in caught if issubclass(w.category, DeferredLogitsWarning)]
    assert names == ["cumsum", "sort"]


@pytest.mark.filterwarnings("ignore::lightning_mst.ops.deferred_logits.DeferredLogitsWarning")
class TestOnceReal:
    def test_the_real_logits_are_computed_once_for_two_askers(self) -> None:
        head = Head()
        logits = head.deferred()
        with Matmuls() as counter:
            logits.cumsum(-1)
            logits.sort(-1)
            logits[..., :3].sum()
        assert counter.multiply_adds == B * S * D * V

    def test_a_loss_still_runs_in_mini_sequences(self) -> None:
        head = Head()
        logits = head.deferred()
        entropy = (logits.softmax(-1) * logits.log_softmax(-1)).sum()
        loss = flat_ce(logits, head.labels) + entropy
        plain = head.plain()
        expected = flat_ce(plain, head.labels) + (plain.softmax(-1) * plain.log_softmax(-1)).sum()
        assert_close(
            torch.autograd.grad(loss, head.tensors), torch.autograd.grad(expected, head.tensors), 1e-10, "gradient"
        )

    def test_logits_asked_for_without_gradients_first_have_them_later(self) -> None:
        head = Head()
        logits = head.deferred()
        with torch.no_grad():
            assert not logits.softmax(-1).requires_grad
        expected = torch.autograd.grad(head.plain().log_softmax(-1)[..., 0].sum(), head.tensors)
        assert_close(torch.autograd.grad(logits.log_softmax(-1)[..., 0].sum(), head.tensors), expected, 1e-10)

    @pytest.mark.parametrize("step", [lambda x: x.float(), lambda x: x * 2.0, lambda x: x[:, 1:]], ids=range(3))
    def test_logits_of_a_frozen_trunk_have_gradients_later_too(self, step: Callable[[Tensor], Tensor]) -> None:
        head = Head(torch.float32)
        head.hidden.requires_grad_(False)
        logits = step(head.deferred())
        assert logits.requires_grad
        with torch.no_grad():
            logits.softmax(-1)
        expected = torch.autograd.grad(step(head.plain()).log_softmax(-1)[..., 0].sum(), [head.weight, head.bias])
        grads = torch.autograd.grad(logits.log_softmax(-1)[..., 0].sum(), [head.weight, head.bias])
        assert_close(grads, expected, 1e-5)

    def test_a_write_shows_in_every_later_answer(self) -> None:
        head = Head()
        logits, plain = head.deferred(), head.plain()
        for each in (logits, plain):
            each[..., :3] = -4.0
            each.mul_(2.0)
        assert_close(flat_ce(logits, head.labels), flat_ce(plain, head.labels), 1e-10)
        assert torch.equal(logits.argmax(-1), plain.argmax(-1))
        assert_close(logits.view(-1, V)[:, :4].detach(), plain.view(-1, V)[:, :4].detach(), 1e-10)
        assert_close(logits.float().softmax(-1).detach(), plain.float().softmax(-1).detach(), 1e-5)

    def test_a_write_to_a_slice_of_the_vocabulary_shows_in_the_logits_or_is_refused(self) -> None:
        head = Head()
        logits, plain = head.deferred(), head.plain()
        plain[..., :3].fill_(-4.0)
        try:
            logits[..., :3].fill_(-4.0)
        except RuntimeError:
            return
        assert_close(flat_ce(logits, head.labels), flat_ce(plain, head.labels), 1e-10)

    @pytest.mark.parametrize("write", [lambda x: x.div_(2.0), lambda x: x.zero_()], ids=["div_", "zero_"])
    def test_a_write_to_the_logits_shows_in_a_slice_of_the_vocabulary_or_is_refused(
        self, write: Callable[[Tensor], object]
    ) -> None:
        head = Head()
        logits, plain = head.deferred(), head.plain()
        part, plain_part = logits[..., :3], plain[..., :3]
        write(plain)
        try:
            write(logits)
        except RuntimeError:
            return
        assert_close(part.detach(), plain_part.detach(), 1e-10)

    @pytest.mark.parametrize(
        "view",
        [lambda x: x.view(-1, V), lambda x: x[:, :-1], lambda x: x.transpose(1, 2), lambda x: x.detach()],
        ids=["view", "slice", "transpose", "detach"],
    )
    @pytest.mark.parametrize(
        "write",
        [lambda x: x.div_(2.0), lambda x: x.__setitem__(0, 1.0), lambda x: x.exp_()],
        ids=["div_", "setitem", "exp_"],
    )
    @pytest.mark.parametrize("to", ["the logits", "the view"])
    def test_a_write_is_refused_when_there_are_views(
        self, view: Callable[[Tensor], Tensor], write: Callable[[Tensor], object], to: str
    ) -> None:
        logits = Head().deferred()
        other = view(logits)
        with pytest.raises(RuntimeError, match="views"):
            write(logits if to == "the logits" else other)

    def test_a_learned_temperature_keeps_its_gradient(self) -> None:
        for shape in ((), (1,), (V,)):
            head = Head()
            temperature = torch.full(shape, 0.7, dtype=torch.float64, requires_grad=True)
            wanted = [*head.tensors, temperature]
            for apply in (
                lambda x, t: x * t,
                lambda x, t: t * x,
                lambda x, t: x / t.exp(),
                lambda x, t: x.mul_(t),
                lambda x, t: torch.mul(x, other=t),
            ):
                expected = torch.autograd.grad(flat_ce(apply(head.plain(), temperature), head.labels), wanted)
                grads = torch.autograd.grad(flat_ce(apply(head.deferred(), temperature), head.labels), wanted)
                assert_close(grads, expected, 1e-10)

    def test_a_gradient_by_hand_of_the_logits_is_the_same(self) -> None:
        """Through ``real()``, the way that the error of a gradient on deferred logits names."""
        head = Head()
        real = head.deferred().real()
        assert type(real) is Tensor
        grad = torch.randn(B, S, V, dtype=torch.float64)
        expected = torch.autograd.grad(head.plain(), head.tensors, grad)
        assert_close(torch.autograd.grad(real, head.tensors, grad), expected, 1e-10)


def test_logits_backward_gives_the_gradients_or_says_what_to_do() -> None:
    head = Head()
    grad = torch.randn(B, S, V, dtype=torch.float64)
    expected = torch.autograd.grad(head.plain(), head.tensors, grad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeferredLogitsWarning)
        head.deferred().backward(grad)
    assert_close([t.grad for t in head.tensors], expected, 1e-10)


def test_a_gradient_of_the_deferred_logits_themselves_is_refused_clearly() -> None:
    logits = Head().deferred()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeferredLogitsWarning)
        with pytest.raises(RuntimeError, match=r"real|not have been used in the graph"):
            torch.autograd.grad(flat_ce(logits, Head().labels), logits)


def test_a_hook_on_the_logits_is_called_with_their_gradient_or_refused() -> None:
    head = Head()
    logits = head.deferred()
    seen: list[Tensor] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeferredLogitsWarning)
        try:
            logits.register_hook(seen.append)
        except (RuntimeError, NotImplementedError):
            return
        flat_ce(logits, head.labels).backward()
    assert len(seen) == 1


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_logits_whose_head_or_input_was_changed_since_are_as_before_or_refused(which: str) -> None:
    """As when outputs are kept over an optimizer step."""
    head = Head()
    expected = flat_ce(head.plain(), head.labels)
    logits = head.deferred()
    with torch.no_grad():
        getattr(head, which).mul_(2.0)
    try:
        loss = flat_ce(logits, head.labels)
    except RuntimeError:
        return
    assert_close(loss, expected, 1e-10)


def test_a_scalar_tensor_changed_since_counts_as_it_was() -> None:
    head = Head()
    scale = torch.tensor(2.0, dtype=torch.float64)
    logits, plain = head.deferred() * scale, head.plain() * scale
    scale.fill_(5.0)
    assert_close(flat_ce(logits, head.labels), flat_ce(plain, head.labels), 1e-10)


# --- metadata and graph -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_metadata_is_that_of_plain_logits_and_makes_nothing_real(dtype: torch.dtype, never_real: None) -> None:
    head = Head(dtype)
    logits, plain = head.deferred(), head.plain()
    questions: list[Callable[[Tensor], Any]] = [
        lambda x: x.shape,
        lambda x: x.size(),
        lambda x: x.size(-1),
        lambda x: x.dtype,
        lambda x: x.device,
        lambda x: x.layout,
        lambda x: x.dim(),
        lambda x: x.ndim,
        lambda x: len(x),
        lambda x: x.numel(),
        lambda x: torch.numel(x),
        lambda x: x.nbytes,
        lambda x: x.itemsize,
        lambda x: x.element_size(),
        lambda x: x.requires_grad,
        lambda x: x.is_leaf,
        lambda x: x.is_cuda,
        lambda x: x.is_floating_point(),
        lambda x: torch.is_floating_point(x),
        lambda x: x.is_complex(),
        lambda x: x.is_contiguous(),
        lambda x: x.grad_fn is not None,
        lambda x: isinstance(x, Tensor),
        lambda x: torch.is_tensor(x),
    ]
    for question in questions:
        assert question(logits) == question(plain)
    assert hash(logits) == id(logits)
    assert {logits: 1}[logits] == 1
    assert logits._real is None


def test_printing_computes_nothing(never_real: None) -> None:
    text = repr(Head().deferred())
    assert "DeferredLogits" in text
    assert f"({B}, {S}, {V})" in text
    assert "float64" in text


@pytest.mark.parametrize(
    "derive",
    [
        lambda x: x,
        lambda x: x.float(),
        lambda x: x / 2.0,
        lambda x: torch.tanh(x / 3.0) * 3.0,
        lambda x: x.div_(2.0),
        lambda x: x[:, :-1],
        lambda x: x.view(-1, V),
        lambda x: x.transpose(1, 2).float(),
        lambda x: x.clone(),
    ],
    ids=["head", "float", "scaled", "soft-cap", "in place", "slice", "view", "transposed", "clone"],
)
@pytest.mark.parametrize("frozen", ["nothing", "trunk", "head"])
def test_the_graph_leads_from_logits_to_hidden_states_and_weights(
    derive: Callable[[Tensor], Tensor], frozen: str, never_real: None
) -> None:
    """DDP with ``find_unused_parameters`` takes every parameter that it does not reach for unused."""
    head = Head()
    trunk = torch.randn(D, D, dtype=torch.float64, requires_grad=True)
    tensors = {"trunk": trunk, "weight": head.weight, "bias": head.bias}
    if frozen == "trunk":
        trunk.requires_grad_(False)
    if frozen == "head":
        head.weight.requires_grad_(False)
        head.bias.requires_grad_(False)
    head.hidden = head.hidden.detach() @ trunk
    logits = derive(head.deferred())
    assert logits.requires_grad
    expected = {id(t) for t in tensors.values() if t.requires_grad}
    assert leaves_of(logits.grad_fn) == expected
    assert leaves_of(flat_ce(head.deferred(), head.labels).grad_fn) == expected


def test_nothing_to_train_means_no_graph(never_real: None) -> None:
    head = Head()
    for tensor in head.tensors:
        tensor.requires_grad_(False)
    logits = head.deferred()
    assert not logits.requires_grad
    assert logits.grad_fn is None
    assert not flat_ce(logits, head.labels).requires_grad


def test_the_head_is_asked_through_run_once_per_loss(never_real: None) -> None:
    head = Head()
    asked: list[torch.Size] = []

    def run(request: Callable[..., Any], hidden: Tensor) -> tuple[Tensor, ...]:
        asked.append(hidden.shape)
        return request(hidden, LinearHead(head.weight, head.bias))

    logits = defer_logits(head.hidden, LinearHead(head.weight, head.bias), split={"num_chunks": 4}, run=run)
    assert asked == []
    loss, grads = head.outcome(lambda x, y: ce(x[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1)), logits)
    assert asked == [(B * (S - 1), D)]
    expected = head.outcome(SHAPES["[:, :-1]"], head.plain())
    assert_close(loss, expected[0], 1e-10)
    assert_close(grads, expected[1], 1e-10)


def test_a_run_whose_answer_was_changed_is_refused() -> None:
    head = Head()
    logits = defer_logits(
        head.hidden,
        LinearHead(head.weight),
        split={"num_chunks": 4},
        run=lambda request, h: list(request(h, LinearHead(head.weight))),
    )
    with pytest.raises(RuntimeError, match="hook of the LM head"):
        flat_ce(logits, head.labels)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(B * S - 1,), (B * S, 1), (1,)], ids=str)
def test_labels_of_another_shape_are_refused_with_both_shapes(shape: tuple[int, ...], never_real: None) -> None:
    with pytest.raises(ValueError, match=r"Labels must have shape \(10,\).*\(10, 11\)"):
        ce(Head().deferred().view(-1, V), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("label", [V, -1])
def test_a_label_out_of_range_is_refused(label: int, never_real: None) -> None:
    head = Head()
    head.labels[1, 1] = label
    with pytest.raises(IndexError, match=rf"Label {label} is out of range"):
        flat_ce(head.deferred(), head.labels)


def test_hidden_states_that_do_not_fit_the_weight_are_refused() -> None:
    with pytest.raises(ValueError, match="must share D"):
        defer_logits(torch.zeros(2, 3), LinearHead(torch.zeros(5, 4)), split={"num_chunks": 2})


@pytest.mark.parametrize(
    "wrong",
    [lambda x: x.view(3, -1, V + 1), lambda x: x[B], lambda x: x.transpose(0, 3), lambda x: x.float(1, 2)],
    ids=["view", "index", "transpose", "float"],
)
def test_what_plain_logits_refuse_deferred_logits_refuse_too(wrong: Callable[[Tensor], Tensor]) -> None:
    head = Head()
    errors = (RuntimeError, IndexError, TypeError)
    with pytest.raises(errors) as expected:
        wrong(head.plain())
    with pytest.raises(errors) as error:
        wrong(head.deferred())
    assert error.type is expected.type


def test_logits_whose_vocabulary_is_not_the_class_dimension_mean_what_plain_torch_means() -> None:
    """(B, S, V) with (B, V) targets: torch takes S for the classes."""
    head = Head()
    target = torch.randint(S, (B, V))
    with pytest.warns(DeferredLogitsWarning, match="cross_entropy"):
        loss = ce(head.deferred(), target)
    assert_close(loss, ce(head.plain(), target), 1e-10)


# --- autocast -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False], ids=["loss inside", "loss outside"])
@pytest.mark.parametrize("use", ["plain", "float", "soft-cap"])
def test_the_heads_autocast_state_counts(inside: bool, use: str, never_real: None) -> None:
    head = Head(torch.float32)
    step = {"plain": lambda x: x, "float": lambda x: x.float(), "soft-cap": lambda x: torch.tanh(x / 2.0) * 2.0}[use]

    def run(make: Callable[[], Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.autocast("cpu", torch.bfloat16):
            logits = make()
            assert logits.dtype == torch.bfloat16
            logits = step(logits)
            if inside:
                loss = flat_ce(logits, head.labels)
        if not inside:
            loss = flat_ce(logits.float(), head.labels)
        return loss, torch.autograd.grad(loss, head.tensors)

    plain, mini = run(head.plain), run(head.deferred)
    assert mini[0].dtype == plain[0].dtype == torch.float32
    assert_close(mini[0], plain[0], 1e-5, "loss")
    # The gradient of the logits is rounded to bf16 either way, at places that differ by one rounding.
    assert_close(mini[1], plain[1], 8e-3, "gradient")


def test_a_head_outside_autocast_stays_in_full_precision(never_real: None) -> None:
    head = Head(torch.float32)
    logits = head.deferred()
    expected = head.outcome(flat_ce, head.plain())
    with torch.autocast("cpu", torch.bfloat16):
        result = head.outcome(flat_ce, logits)
    assert_close(result[0], expected[0], 1e-5)
    assert_close(result[1], expected[1], 1e-5)


@pytest.mark.parametrize("ask", [lambda x: x.argmax(-1), lambda x: x.detach().softmax(-1)], ids=["argmax", "softmax"])
def test_an_answer_without_gradients_in_an_autocast_block_costs_nobody_a_gradient(ask: Callable[[Tensor], Any]) -> None:
    head = Head(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeferredLogitsWarning)
        with torch.autocast("cpu", torch.bfloat16):
            logits = head.deferred()
            ask(logits)
            y = logits.log_softmax(-1)
            z = F.linear(head.hidden, head.weight)
    for value in (y, z):
        (grad,) = torch.autograd.grad(value.float()[..., 0].sum(), [head.weight], retain_graph=True)
        assert grad.norm() > 0


@pytest.mark.parametrize("step", [lambda x: x, lambda x: x.float()], ids=["as they are", "float"])
def test_the_loss_of_bf16_logits_is_as_near_to_the_truth_as_that_of_their_fp32_copy(
    step: Callable[[Tensor], Tensor],
) -> None:
    plain_error = mini_error = 0.0
    for seed in range(8):
        torch.manual_seed(seed)
        head = Head(torch.bfloat16)
        exact = [t.detach().double() for t in head.tensors]
        truth = flat_ce(F.linear(*exact), head.labels)
        loss = flat_ce(step(head.deferred()), head.labels)
        assert loss.dtype == torch.float32
        mini_error += abs(loss.item() - truth.item())
        plain_error += abs(flat_ce(head.plain().float(), head.labels).item() - truth.item())
    assert mini_error <= 1.1 * plain_error
