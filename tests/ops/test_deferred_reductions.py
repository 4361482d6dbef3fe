"""What leaves little of the vocabulary: log-probabilities, entropies, distillation, accuracy."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops_tools import B, D, Head, Matmuls, S, V, assert_close, leaves_of, total_distance
from torch import Tensor

from lightning_mst.memory import TensorBytes
from lightning_mst.ops import LinearHead
from lightning_mst.ops.deferred_logits import DeferredLogits, defer_logits

Use = Callable[["World"], Tensor]


class World:
    """Two models' logits, labels, and what else a loss may depend on; every float of it gets a gradient."""

    def __init__(self, dtype: torch.dtype = torch.float64, *, bias: bool = True) -> None:
        self.student, self.teacher = Head(dtype, bias=bias), Head(dtype, bias=bias)
        self.labels = torch.randint(V, (B, S))
        self.ignored = self.student.labels
        self.mask = torch.rand(B, S) > 0.4
        self.per_token = (torch.rand(B, S, 1, dtype=torch.float64) + 0.5).to(dtype).requires_grad_()
        self.per_class = torch.linspace(0.5, 1.5, V, dtype=torch.float64).to(dtype).requires_grad_()
        self.scalar = torch.tensor(0.7, dtype=dtype, requires_grad=True)
        self.tensors = [*self.student.tensors, *self.teacher.tensors, self.per_token, self.per_class, self.scalar]
        self.deferred = True
        self.num_chunks = 3

    def logits(self, head: Head) -> Tensor:
        return head.deferred(self.num_chunks) if self.deferred else head.plain()

    @property
    def x(self) -> Tensor:
        return self.logits(self.student)

    @property
    def t(self) -> Tensor:
        return self.logits(self.teacher)

    @property
    def frozen(self) -> Tensor:
        """The teacher as distillation runs it."""
        with torch.no_grad():
            return self.t

    def outcome(self, use: Use, deferred: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        self.deferred = deferred
        result = use(self)
        incoming = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype).view(result.shape)
        return result.detach(), torch.autograd.grad(result, self.tensors, incoming, allow_unused=True)


def entropy(x: Tensor) -> Tensor:
    log_probs = x.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def picked(x: Tensor, y: Tensor) -> Tensor:
    return x.gather(-1, y.unsqueeze(-1)).squeeze(-1)


def log_probs(x: Tensor, y: Tensor) -> Tensor:
    return picked(x.log_softmax(-1), y)


def at(x: Tensor, y: Tensor) -> Tensor:
    flat = x.view(-1, V)
    return flat[torch.arange(len(flat)), y.view(-1)]


def dpo(w: World) -> Tensor:
    """Rafailov et al. 2023, as one would write it: the first sequence is chosen, the second rejected."""

    def sequence(logits: Tensor) -> Tensor:
        return (log_probs(logits[:, :-1], w.labels[:, 1:]) * w.mask[:, 1:]).sum(-1)

    policy, reference = sequence(w.x), sequence(w.frozen)
    ratio = policy - reference
    return -F.logsigmoid(0.1 * (ratio[0] - ratio[1]))


def policy_gradient(w: World) -> Tensor:
    """A clipped policy-gradient loss with an entropy bonus."""
    new = log_probs(w.x / 0.9, w.labels)
    ratio = (new - (new.detach() - 0.1)).exp()
    gain = torch.minimum(ratio * 0.7, ratio.clamp(0.9, 1.1) * 0.7)
    return -(gain * w.mask).sum() / w.mask.sum() - 0.01 * entropy(w.x)[w.mask].mean()


def distilled(w: World, **options: Any) -> Tensor:
    return F.kl_div(F.log_softmax(w.x / 2.0, dim=-1), F.softmax(w.frozen / 2.0, dim=-1), **options) * 4.0


def masked_distilled(w: World) -> Tensor:
    return (distilled(w, reduction="none").sum(-1) * w.mask).sum() / w.mask.sum()


def jensen_shannon(w: World) -> Tensor:
    p, q = w.x.log_softmax(-1), w.frozen.log_softmax(-1)
    mixture = torch.logaddexp(p + math.log(0.3), q + math.log(0.7))
    kl_p = F.kl_div(mixture, p, reduction="none", log_target=True)
    kl_q = F.kl_div(mixture, q, reduction="none", log_target=True)
    return (0.3 * kl_p + 0.7 * kl_q)[w.mask].sum() / w.mask.sum()


def focal(w: World) -> Tensor:
    p = w.x.softmax(-1)
    chosen = picked(p, w.labels)
    return -((1 - chosen) ** 2 * chosen.log()).mean()


def unlikely(w: World) -> Tensor:
    with torch.no_grad():
        weights = w.x.softmax(-1)
    return (weights * w.x.log_softmax(-1)).sum(-1)


REDUCTIONS: dict[str, Use] = {
    "logsumexp": lambda w: w.x.logsumexp(-1),
    "torch.logsumexp, keepdim": lambda w: torch.logsumexp(w.x, dim=-1, keepdim=True),
    "logsumexp of a tuple": lambda w: torch.logsumexp(w.x, (2,)),
    "logsumexp, channels first": lambda w: w.x.transpose(1, 2).logsumexp(1, keepdim=True),
    "sum": lambda w: w.x.softmax(-1).square().sum(-1),
    "sum, keepdim": lambda w: (w.x**2).sum(-1, keepdim=True),
    "sum with dtype": lambda w: w.x.sum(-1, dtype=torch.float32),
    "sum of all": lambda w: (w.x**2).sum(),
    "sum over two dimensions": lambda w: (w.x**2).sum((1, 2)),
    "sum over two dimensions, keepdim": lambda w: (w.x**2).sum((0, -1), keepdim=True),
    "mean": lambda w: w.x.mean(-1),
    "mean of all": lambda w: (w.x**2).mean(),
    "mean over two dimensions": lambda w: torch.mean(w.x**2, (0, 2)),
    "max": lambda w: w.x.max(-1).values,
    "max unpacked": lambda w: torch.max(w.x, dim=-1, keepdim=True)[0],
    "min": lambda w: w.x.min(dim=-1).values,
    "amax": lambda w: w.x.amax(-1),
    "amin, keepdim": lambda w: torch.amin(w.x, dim=-1, keepdim=True),
    "topk": lambda w: w.x.topk(3).values,
    "topk, channels first": lambda w: torch.topk(w.x.transpose(1, 2), k=2, dim=1, largest=False).values,
    "margin": lambda w: torch.topk(w.x.softmax(-1), 2).values.diff(dim=-1),
    "gather": lambda w: picked(w.x, w.labels),
    "gather of several": lambda w: w.x.softmax(-1).gather(-1, torch.randint(V, (B, S, 4), generator=generator())),
    "gather of several raw logits": lambda w: w.x.gather(-1, torch.randint(V, (B, S, 4), generator=generator())),
    "gather, channels first": lambda w: torch.gather(w.x.transpose(1, 2), 1, w.labels.unsqueeze(1)),
    "take_along_dim": lambda w: torch.take_along_dim(w.x.log_softmax(-1), w.labels.unsqueeze(-1), dim=-1),
    "index": lambda w: at(w.x.softmax(-1), w.labels),
    "index of raw logits": lambda w: at(w.x, w.labels),
    "negative index": lambda w: at(w.x, w.labels - V),
    "index of several dimensions": lambda w: w.x[torch.arange(B).unsqueeze(1), torch.arange(S), w.labels],
    "index with a number": lambda w: w.x[1, torch.arange(S), w.labels[1]],
}  # fmt: skip

LOG_PROBS: dict[str, Use] = {
    "log_softmax, gather": lambda w: log_probs(w.x, w.labels),
    "F.log_softmax of a view": lambda w: F.log_softmax(w.x.view(-1, V), dim=1).gather(1, w.labels.view(-1, 1)),
    "softmax, gather, log": lambda w: picked(F.softmax(w.x, -1), w.labels).log(),
    "chosen minus logsumexp": lambda w: picked(w.x, w.labels) - w.x.logsumexp(-1),
    "shifted": lambda w: log_probs(w.x[:, :-1, :], w.labels[:, 1:]),
    "masked": lambda w: log_probs(w.x[w.mask], w.labels[w.mask]),
    "soft-capped": lambda w: log_probs(torch.tanh(w.x / 2.0) * 2.0, w.labels),
    "soft-capped, gather alone": lambda w: picked(torch.tanh(w.x / 2.0) * 2.0, w.labels),
    "temperature of a token": lambda w: log_probs(w.x / w.per_token, w.labels),
    "temperature of a token, gather alone": lambda w: picked(w.x / w.per_token, w.labels),
    "learned temperature": lambda w: log_probs(w.x * w.scalar, w.labels),
    "learned temperature, gather alone": lambda w: picked(w.x * w.scalar, w.labels),
    "bias of a class": lambda w: log_probs(w.x + w.per_class, w.labels),
    "bias of a class first": lambda w: picked(w.per_class + w.x, w.labels),
    "minus its own logsumexp": lambda w: picked(w.x - w.x.logsumexp(-1, keepdim=True), w.labels),
    "centred": lambda w: (w.x - w.x.mean(-1, keepdim=True)).square().mean(),
    "log_softmax, nll_loss": lambda w: F.nll_loss(w.x.view(-1, V).log_softmax(-1), w.labels.view(-1)),
    "log_softmax, nll_loss with ignored": lambda w: F.nll_loss(
        F.log_softmax(w.x, -1).flatten(0, 1), w.ignored.flatten(), reduction="sum"
    ),
    "channels first, nll_loss of each": lambda w: F.nll_loss(
        w.x.log_softmax(-1).transpose(1, 2), w.ignored, reduction="none"
    ),
    "scaled log_softmax, nll_loss": lambda w: F.nll_loss(
        2.0 * w.x.view(-1, V).log_softmax(-1), w.ignored.view(-1), weight=w.per_class.detach()
    ),
    "cross_entropy with a learned temperature": lambda w: F.cross_entropy(
        (w.x * w.scalar).view(-1, V), w.ignored.view(-1), label_smoothing=0.1
    ),
    "cross_entropy of a mixture": lambda w: F.cross_entropy(
        (0.3 * w.x + 0.7 * w.t).view(-1, V), w.ignored.view(-1), weight=w.per_class.detach(), reduction="mean"
    ),
    "cross_entropy with class probabilities": lambda w: F.cross_entropy(
        w.x.view(-1, V), torch.rand(B * S, V, dtype=torch.float64, generator=generator()).softmax(-1)
    ),
    "masked classes": lambda w: log_probs(w.x.masked_fill(torch.arange(V) == 3, -1e9), w.labels.clamp(max=2)),
    "masked tokens": lambda w: log_probs(w.x.masked_fill(~w.mask.unsqueeze(-1), 0.0), w.labels),
    "where": lambda w: torch.where(w.mask.unsqueeze(-1), w.x, w.t * 0.5).logsumexp(-1),
    "dpo": dpo,
    "policy gradient": policy_gradient,
    "entropy": lambda w: entropy(w.x),
    "entropy by softmax": lambda w: -(w.x.softmax(-1) * w.x.log_softmax(-1)).sum(-1),
    "entropy in chunks of its own": lambda w: torch.cat([entropy(part) for part in w.x.view(-1, V).split(4)]),
    "half detached": lambda w: (w.x.softmax(-1).detach() * w.x.log_softmax(-1)).sum(-1),
    "weights made under no_grad": unlikely,
    "focal": focal,
}  # fmt: skip

DISTILLATION: dict[str, Use] = {
    "batchmean": lambda w: distilled(w, reduction="batchmean"),
    "sum": lambda w: distilled(w, reduction="sum"),
    "none, masked": masked_distilled,
    "log target": lambda w: F.kl_div(
        w.x.log_softmax(-1), w.frozen.log_softmax(-1), log_target=True, reduction="batchmean"
    ),
    "teacher learns too": lambda w: F.kl_div(w.x.log_softmax(-1), w.t.softmax(-1), reduction="batchmean"),
    "module": lambda w: torch.nn.KLDivLoss(reduction="batchmean")(w.x.log_softmax(-1), w.frozen.softmax(-1)),
    "shifted and flat": lambda w: F.kl_div(
        w.x[:, :-1].reshape(-1, V).log_softmax(-1), w.frozen[:, :-1].reshape(-1, V).softmax(-1), reduction="batchmean"
    ),
    "reverse": lambda w: (w.x.softmax(-1) * (w.x.log_softmax(-1) - w.frozen.log_softmax(-1))).sum(-1).mean(),
    "plain teacher": lambda w: F.kl_div(
        w.x.log_softmax(-1), w.teacher.plain().detach().softmax(-1), reduction="batchmean"
    ),
    "plain teacher in half": lambda w: F.cross_entropy(w.x.view(-1, V), w.frozen.view(-1, V).softmax(-1)),
    "same head as its own teacher": lambda w: F.kl_div(
        (w.x * 2).log_softmax(-1), w.x.detach().softmax(-1), reduction="sum"
    ),
    "logits": lambda w: F.mse_loss(w.x, w.frozen),
    "stacked": lambda w: torch.logsumexp(torch.stack([w.x.log_softmax(-1), w.t * w.scalar]), dim=0).logsumexp(-1),
    "stacked, mean": lambda w: picked(torch.stack([w.x.softmax(-1), w.t.softmax(-1)]).mean(0).log(), w.labels),
    "Jensen-Shannon": jensen_shannon,
}  # fmt: skip

USES = {**REDUCTIONS, **LOG_PROBS, **{f"distillation: {name}": use for name, use in DISTILLATION.items()}}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("use", USES)
def test_values_and_all_gradients_are_exact_without_the_logits(use: str, bias: bool, never_real: None) -> None:
    world = World(bias=bias)
    value, expected = world.outcome(USES[use], deferred=False)
    mini_value, grads = world.outcome(USES[use], deferred=True)
    assert not isinstance(mini_value, DeferredLogits)
    tolerance = 1e-6 if value.dtype == torch.float32 else 1e-10
    assert_close(mini_value, value, tolerance, "value")
    wanted = [torch.zeros_like(t) if g is None else g for g, t in zip(expected, world.tensors, strict=True)]
    got = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, world.tensors, strict=True)]
    assert_close(got, wanted, tolerance, "gradient")


@pytest.mark.parametrize("num_chunks", [1, 2, 99])
@pytest.mark.parametrize("use", ["log_softmax, gather", "chosen minus logsumexp", "topk", "distillation: none, masked"])
def test_any_number_of_chunks_is_exact(use: str, num_chunks: int, never_real: None) -> None:
    world = World()
    world.num_chunks = num_chunks
    value, expected = world.outcome(USES[use], deferred=False)
    mini_value, grads = world.outcome(USES[use], deferred=True)
    assert_close(mini_value, value, 1e-10)
    assert_close(grads, expected, 1e-10)


# --- what it costs ------------------------------------------------------------------------------------------------

STUDENT_PASS = B * S * D * V

PASSES: dict[str, tuple[float, Use]] = {
    "logsumexp": (4, lambda w: w.x.logsumexp(-1)),
    "log_softmax, gather": (4, USES["log_softmax, gather"]),
    "softmax times log_softmax": (4, lambda w: entropy_of_two_views(w.x)),
    "half detached": (4, lambda w: half_detached(w.x)),
    "weights made under no_grad": (4, lambda w: weighted_under_no_grad(w.x)),
    "gather": (2 / V, USES["gather"]),
    "chosen minus logsumexp": (4 + 2 / V, USES["chosen minus logsumexp"]),
    "log_softmax, nll_loss": (3, USES["log_softmax, nll_loss"]),
    "cross_entropy": (3, lambda w: F.cross_entropy((w.x * 0.5).view(-1, V), w.labels.view(-1))),
    "distillation": (4 + 2, USES["distillation: batchmean"]),
    "argmax": (1, lambda w: w.x.argmax(-1) * w.scalar),
}  # fmt: skip


def entropy_of_two_views(x: Tensor) -> Tensor:
    return -(x.softmax(-1).view(-1, V) * x.view(-1, V).log_softmax(-1)).sum(-1)


def half_detached(x: Tensor) -> Tensor:
    return (x.softmax(-1).detach() * x.log_softmax(-1)).sum(-1)


def weighted_under_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        weights = x.view(-1, V).softmax(-1)
    return (weights * x.view(-1, V).log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("use", PASSES)
def test_matmuls_over_the_vocabulary(use: str, never_real: None) -> None:
    passes, run = PASSES[use]
    world = World(bias=False)
    with Matmuls() as counter:
        world.outcome(run, deferred=True)
    assert counter.multiply_adds == pytest.approx(passes * STUDENT_PASS)


def test_frozen_weights_cost_no_matmul(never_real: None) -> None:
    world = World(bias=False)
    world.student.weight.requires_grad_(False)
    with Matmuls() as counter:
        torch.autograd.grad(log_probs(world.x, world.labels).sum(), world.student.hidden)
    assert counter.multiply_adds == 3 * STUDENT_PASS


@pytest.mark.parametrize("use", ["log_softmax, gather", "entropy", "distillation: none, masked", "gather"])
def test_without_gradients_one_pass_and_no_graph(use: str, never_real: None) -> None:
    world = World()
    with torch.no_grad():
        value = USES[use](world)
        world.deferred = False
        assert_close(value, USES[use](world), 1e-10)
    assert not value.requires_grad


@pytest.mark.parametrize("use", ["log_softmax, gather", "entropy in chunks of its own", "gather", "cross_entropy"])
def test_nothing_as_wide_as_the_vocabulary_is_kept_for_backward(use: str, never_real: None) -> None:
    """Not even when a program walks chunks itself, each of them a single one of ours."""
    world = World()
    world.num_chunks = 1
    kept: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape != world.student.weight.shape:
            kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        {**USES, **{name: run for name, (_, run) in PASSES.items()}}[use](world)
    assert kept
    assert all(V not in shape for shape in kept if shape != (V,)), kept


@pytest.mark.parametrize("use", ["log_softmax, gather", "gather", "log_softmax, nll_loss", "Jensen-Shannon", "topk"])
def test_nothing_waits_for_the_garbage_collector(use: str, never_real: None) -> None:
    world = World()
    gc.collect()
    gc.disable()
    try:
        hidden = world.student.hidden
        world.student.hidden = hidden * 2.0
        freed = weakref.ref(world.student.hidden)
        {**USES, "Jensen-Shannon": jensen_shannon}[use](world)
        world.student.hidden = hidden
        assert freed() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "use",
    [
        lambda x, t, y: log_probs(x.float(), y).sum(),
        lambda x, t, y: (picked(x, y) - x.logsumexp(-1)).sum(),
        lambda x, t, y: entropy(x / 0.9).mean(),
        lambda x, t, y: F.kl_div(x.log_softmax(-1), t.softmax(-1), reduction="batchmean"),
        lambda x, t, y: -log_probs(x, y).sum() + entropy(x).sum() + x.logsumexp(-1).square().sum(),
    ],
    ids=["log-probabilities", "chosen minus logsumexp", "entropy", "distillation", "three of them"],
)
def test_peak_memory_is_that_of_a_few_chunks_and_weights(use: Callable[..., Tensor], never_real: None) -> None:
    tokens, width, vocab_size, chunk = 2048, 16, 4096, 64
    labels = torch.randint(vocab_size, (1, tokens))
    hidden = [torch.randn(1, tokens, width, requires_grad=True) for _ in range(2)]
    weights = [torch.randn(vocab_size, width, requires_grad=True) for _ in range(2)]
    with TensorBytes([*hidden, *weights, labels]) as memory:
        x, t = (
            defer_logits(h, LinearHead(w), split={"chunk_tokens": chunk}) for h, w in zip(hidden, weights, strict=True)
        )
        use(x, t, labels).backward()
    held = sum(t.nbytes for t in (*hidden, *weights))
    whole, part = (n * vocab_size * 4 for n in (tokens, chunk))
    assert memory.peak <= 4 * held + 12 * part < whole


# --- accuracy -----------------------------------------------------------------------------------------------------


def rank(x: Tensor, y: Tensor) -> Tensor:
    return (x > x.gather(-1, y.unsqueeze(-1))).sum(-1)


COUNTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "accuracy": lambda x, y: (x.argmax(-1) == y).float().mean(),
    "argmin": lambda x, y: x.argmin(dim=-1),
    "largest by max": lambda x, y: x.max(-1).indices,
    "min unpacked": lambda x, y: torch.min(x, -1)[1],
    "top-k accuracy": lambda x, y: (x.topk(3, dim=-1).indices == y.unsqueeze(-1)).any(-1).float().mean(),
    "top-k by name": lambda x, y: torch.topk(input=x, k=2, largest=False).indices,
    "channels first": lambda x, y: x.transpose(1, 2).topk(2, dim=1)[1],
    "of probabilities": lambda x, y: x.softmax(-1).argmax(-1),
    "rank": lambda x, y: rank(x.detach(), y),
    "rank, the other way": lambda x, y: (picked(x.detach(), y).unsqueeze(-1) < x.detach()).sum(dim=-1, keepdim=True),
    "all finite": lambda x, y: torch.isfinite(x).all(),
    "nan in a token": lambda x, y: (x != x).any(-1),
    "how many": lambda x, y: (x >= 0.5).sum(),
}  # fmt: skip


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("use", COUNTS)
def test_places_in_the_vocabulary_are_found_without_the_logits(
    use: str, mode: Callable[[], Any], never_real: None
) -> None:
    head = Head()
    labels = head.labels.clamp(min=0)
    with mode():
        assert torch.equal(COUNTS[use](head.deferred(), labels), COUNTS[use](head.plain(), labels))


# --- dtypes -------------------------------------------------------------------------------------------------------

IN_HALF: dict[str, Use] = {
    "log_softmax, gather": USES["log_softmax, gather"],
    "log_softmax in fp32": lambda w: picked(F.log_softmax(w.x, -1, dtype=torch.float32), w.labels),
    "float first": lambda w: log_probs(w.x.float(), w.labels),
    "gather": USES["gather"],
    "chosen minus logsumexp": USES["chosen minus logsumexp"],
    "entropy": USES["entropy"],
    "temperature of a token": USES["temperature of a token"],
    "sum of all": lambda w: w.x.softmax(-1).square().sum(),
    "distillation": USES["distillation: batchmean"],
    "dpo": dpo,
}  # fmt: skip


@pytest.mark.parametrize("form", ["bf16", "autocast"])
@pytest.mark.parametrize("use", IN_HALF)
def test_in_half_precision_it_is_as_near_to_the_truth_as_real_logits_and_of_the_same_dtype(
    use: str, form: str, never_real: None
) -> None:
    errors = {True: 0.0, False: 0.0}
    for seed in range(16):
        torch.manual_seed(seed)
        world = World(torch.bfloat16 if form == "bf16" else torch.float32)
        exact = World()
        for ours, theirs in zip(exact.tensors, world.tensors, strict=True):
            ours.data.copy_(theirs.detach())
        exact.labels, exact.mask = world.labels, world.mask
        truth, true_grads = exact.outcome(IN_HALF[use], deferred=False)
        dtypes = []
        for deferred in errors:
            with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
                value, grads = world.outcome(IN_HALF[use], deferred)
            dtypes.append([None if t is None else t.dtype for t in (value, *grads)])
            pairs = [(g, t) for g, t in zip(grads, true_grads, strict=True) if g is not None]
            errors[deferred] += total_distance([value, *(g for g, _ in pairs)], [truth, *(t for _, t in pairs)])
        assert dtypes[0] == dtypes[1]
    assert errors[True] <= 1.1 * errors[False]


def test_a_reduction_runs_under_the_autocast_state_of_its_own_call(never_real: None) -> None:
    world = World(torch.float32)
    logits = world.x
    with torch.autocast("cpu", torch.bfloat16):
        inside = logits.log_softmax(-1).logsumexp(-1)
        half = world.x.softmax(-1).sum(-1)
        world.deferred = False
        assert inside.dtype == world.student.plain().float().log_softmax(-1).logsumexp(-1).dtype
        assert half.dtype == world.x.softmax(-1).sum(-1).dtype
    assert_close(picked(logits, world.labels), picked(world.student.plain(), world.labels), 1e-5)


# --- shapes and errors --------------------------------------------------------------------------------------------


def test_no_tokens_at_all(never_real: None) -> None:
    world = World()
    none = torch.zeros(B, S, dtype=torch.bool)
    for use in (
        lambda: log_probs(world.x[none], world.labels[none]).sum(),
        lambda: picked(world.x[none], world.labels[none]).sum(),
        lambda: entropy(world.x[:, :0]).sum(),
        lambda: F.kl_div(world.x[none].log_softmax(-1), world.frozen[none].softmax(-1), reduction="sum"),
    ):
        value = use()
        assert value.item() == 0
        assert all(not g.any() for g in torch.autograd.grad(value, world.student.tensors))


def test_one_token_without_leading_dimensions(never_real: None) -> None:
    head = Head(lead=())
    value, grads = head.outcome(lambda x, y: x.logsumexp(-1), head.deferred())
    expected, expected_grads = head.outcome(lambda x, y: x.logsumexp(-1), head.plain())
    assert_close(value, expected, 1e-10)
    assert_close(grads, expected_grads, 1e-10)


@pytest.mark.parametrize("index", [-100, V])
@pytest.mark.parametrize("of", [lambda x: x, lambda x: x.log_softmax(-1)], ids=["logits", "log_softmax"])
def test_an_index_out_of_range_is_refused(of: Callable[[Tensor], Tensor], index: int) -> None:
    places = torch.zeros(B, S, 1, dtype=torch.int64)
    places[1, 2] = index
    with pytest.raises((IndexError, RuntimeError), match=r"out of|range"):
        of(Head().deferred()).gather(-1, places)


def test_logits_of_different_shapes_mean_what_plain_torch_means() -> None:
    world = World()
    with pytest.warns(UserWarning, match="add"):
        value = world.x + world.t[:, :1]
    with pytest.raises(RuntimeError, match="must match"):
        world.x + world.t[:, 1:]
    assert_close(value, world.student.plain() + world.teacher.plain()[:, :1], 1e-10)


def test_an_operand_changed_since_counts_as_it_was(never_real: None) -> None:
    world = World()
    scale = world.per_token.detach().clone()
    logits = world.x * scale
    expected = (world.student.plain() * scale).logsumexp(-1)
    scale.fill_(5.0)
    assert_close(logits.logsumexp(-1), expected, 1e-10)


def test_a_wide_operand_changed_since_is_refused(never_real: None) -> None:
    world = World()
    wide = world.teacher.plain().detach()
    logits = world.x + wide
    wide.zero_()
    with pytest.raises(RuntimeError, match="changed after"):
        logits.logsumexp(-1)


def test_gradients_of_gradients_are_refused_clearly(never_real: None) -> None:
    world = World()
    for value in (log_probs(world.x, world.labels), picked(world.x, world.labels)):
        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(value.sum(), world.student.hidden, create_graph=True)


def test_there_is_no_memory_to_address_by_strides(never_real: None) -> None:
    """Who finds a last stride of 1 hands the logits' memory to a kernel of its own (TRL on a GPU)."""
    logits = World().x
    assert logits.stride(-1) == 0
    assert logits.stride() == (0, 0, 0)


# --- several heads ------------------------------------------------------------------------------------------------


def test_two_heads_are_asked_one_inside_the_other_and_each_once(never_real: None) -> None:
    world, log = World(), []

    def deferred(head: Head, name: str) -> Tensor:
        def run(request: Callable[..., Any], hidden: Tensor) -> tuple[Tensor, ...]:
            log.append(f"{name} gathers")
            # As FSDP does: what reaches the request is not the tensor that was given.
            answer = request(hidden.view_as(hidden), LinearHead(head.weight, head.bias))
            log.append(f"{name} frees")
            return answer

        return defer_logits(head.hidden, LinearHead(head.weight, head.bias), split={"num_chunks": 4}, run=run)

    def loss(x: Tensor, t: Tensor) -> Tensor:
        return F.kl_div(x.log_softmax(-1), t.softmax(-1), reduction="sum")

    tensors = [*world.student.tensors, *world.teacher.tensors]
    expected = torch.autograd.grad(loss(world.student.plain(), world.teacher.plain()), tensors)
    value = loss(deferred(world.student, "x"), deferred(world.teacher, "t"))
    assert log == ["x gathers", "t gathers", "t frees", "x frees"]
    assert_close(torch.autograd.grad(value, tensors), expected, 1e-10)


def test_multi_token_prediction_with_one_head_called_three_times(never_real: None) -> None:
    head = Head()
    trunk = [torch.randn(D, D, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    run = Asked(head)

    def loss(deferred: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for step, layer in enumerate(trunk, 1):
            hidden = head.hidden @ layer
            logits = run.logits(hidden) if deferred else F.linear(hidden, head.weight, head.bias)
            total = total + F.cross_entropy(logits[:, :-step].flatten(0, 1), head.labels[:, step:].flatten())
            total = total + logits[:, :-step].logsumexp(-1).square().mean()
        return total

    wanted = [*head.tensors, *trunk]
    expected = torch.autograd.grad(loss(False), wanted)
    assert_close(torch.autograd.grad(loss(True), wanted), expected, 1e-10)


def test_two_calls_of_one_head_in_one_loss_ask_it_once(never_real: None) -> None:
    head = Head()
    run = Asked(head)
    draft = torch.randn(D, D, dtype=torch.float64, requires_grad=True)

    def loss(near: Tensor, far: Tensor) -> Tensor:
        return F.kl_div(far.log_softmax(-1), near.detach().softmax(-1), reduction="batchmean")

    expected = torch.autograd.grad(
        loss(head.plain(), F.linear(head.hidden @ draft, head.weight, head.bias)), [*head.tensors, draft]
    )
    value = loss(run.logits(head.hidden), run.logits(head.hidden @ draft))
    assert run.times == 1
    assert_close(torch.autograd.grad(value, [*head.tensors, draft]), expected, 1e-10)


class Asked:
    """A head that counts how often it is asked."""

    def __init__(self, head: Head) -> None:
        self.head = LinearHead(head.weight, head.bias)
        self.times = 0

    def __call__(self, request: Callable[..., Any], hidden: Tensor) -> tuple[Tensor, ...]:
        self.times += 1
        return request(hidden, self.head)

    def logits(self, hidden: Tensor) -> Tensor:
        return defer_logits(hidden, self.head, split={"num_chunks": 3}, run=self)


@pytest.mark.parametrize("frozen", ["nothing", "teacher"])
def test_the_graph_leads_to_every_head_and_operand(frozen: str, never_real: None) -> None:
    world = World()
    teacher = world.frozen if frozen == "teacher" else world.t
    logits = ((world.x * world.per_token + teacher) * world.scalar + world.per_class)[:, 1:].softmax(-1)
    expected = [*world.student.tensors, world.per_token, world.scalar, world.per_class]
    expected += [] if frozen == "teacher" else world.teacher.tensors
    assert leaves_of(logits.grad_fn) == {id(t) for t in expected}


def test_a_detached_copy_does_not_keep_the_graph_alive(never_real: None) -> None:
    head = Head()
    trunk = head.hidden.exp()  # saves its result for backward
    freed = weakref.ref(trunk)
    kept = defer_logits(trunk * 2.0, LinearHead(head.weight), split={"num_chunks": 2}).detach()
    del trunk
    gc.collect()
    assert freed() is None
    assert kept.logsumexp(-1).shape == (B, S)


@pytest.mark.filterwarnings("ignore::lightning_mst.ops.deferred_logits.DeferredLogitsWarning")
@pytest.mark.parametrize(
    "use",
    [
        lambda x, t: torch.stack([x, t]).cumsum(-1),
        lambda x, t: torch.stack([x, t], 1).logsumexp(1),
        lambda x, t: torch.stack([x, t]).logsumexp(-1),
        lambda x, t: torch.stack([x, t])[1].softmax(-1),
        lambda x, t: torch.stack([x, t]).mul_(2.0).sum(0),
    ],
    ids=["cumsum", "another dimension", "over the vocabulary", "part", "in place"],
)
def test_anything_else_on_stacked_logits_is_right(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    world = World()
    value, expected = world.outcome(lambda w: use(w.x, w.t), deferred=False)
    mini_value, grads = world.outcome(lambda w: use(w.x, w.t), deferred=True)
    assert_close(mini_value, value, 1e-10)
    assert_close(grads[:6], expected[:6], 1e-10)


# --- other people's code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trl_log_probabilities(dtype: torch.dtype, temperature: float, never_real: None) -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    world = World(dtype)

    def use(w: World) -> Tensor:
        return utils.selective_log_softmax(w.x[:, :-1], w.labels[:, 1:], temperature=temperature)

    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    value, expected = world.outcome(use, deferred=False)
    mini_value, grads = world.outcome(use, deferred=True)
    assert_close(mini_value, value, tolerance)
    assert_close(grads, expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_trl_entropy(dtype: torch.dtype, never_real: None) -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    world = World(dtype)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    value, expected = world.outcome(lambda w: utils.entropy_from_logits(w.x, chunk_size=4), deferred=False)
    mini_value, grads = world.outcome(lambda w: utils.entropy_from_logits(w.x, chunk_size=4), deferred=True)
    assert_close(mini_value, value, tolerance)
    assert_close(grads, expected, tolerance)


@pytest.mark.parametrize("average", [True, False])
def test_trl_sequence_log_probabilities(average: bool, never_real: None) -> None:
    trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    world = World()

    def use(w: World) -> Tensor:
        return trainer.get_batch_logps(w.x, w.ignored, average_log_prob=average)

    value, expected = world.outcome(use, deferred=False)
    mini_value, grads = world.outcome(use, deferred=True)
    assert_close(mini_value, value, 1e-10)
    assert_close(grads, expected, 1e-10)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
def test_trl_generalised_distillation(beta: float, reduction: str, never_real: None) -> None:
    trainer = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    world = World()

    def use(w: World) -> Tensor:
        return trainer.generalized_jsd_loss(w.x, w.frozen, w.ignored, beta=beta, temperature=0.9, reduction=reduction)

    value, expected = world.outcome(use, deferred=False)
    mini_value, grads = world.outcome(use, deferred=True)
    assert_close(mini_value, value, 1e-10)
    assert_close(grads, expected, 1e-10)


def test_torch_distributions(never_real: None) -> None:
    world = World()

    def use(w: World) -> Tensor:
        policy = torch.distributions.Categorical(logits=w.x)
        return policy.log_prob(w.labels) + 0.1 * policy.entropy()

    value, expected = world.outcome(use, deferred=False)
    mini_value, grads = world.outcome(use, deferred=True)
    assert_close(mini_value, value, 1e-10)
    assert_close(grads, expected, 1e-10)


@pytest.mark.parametrize("ignore_index", [None, -100])
def test_torchmetrics_perplexity(ignore_index: int | None, never_real: None) -> None:
    text = pytest.importorskip("torchmetrics.text")
    world = World(torch.float32)
    labels = world.labels if ignore_index is None else world.ignored
    ours, theirs = text.Perplexity(ignore_index), text.Perplexity(ignore_index)
    for _ in range(2):
        ours.update(world.x, labels)
        theirs.update(world.student.plain(), labels)
    assert_close(ours.compute(), theirs.compute(), 1e-5)


def test_torchmetrics_accuracy(never_real: None) -> None:
    classification = pytest.importorskip("torchmetrics.classification")
    world = World(torch.float32)
    values = []
    for logits in (world.x, world.student.plain()):
        metric = classification.MulticlassAccuracy(num_classes=V, ignore_index=-100, validate_args=False)
        metric.update(logits.view(-1, V), world.ignored.view(-1))
        values.append(metric.compute())
    assert torch.equal(*values)
