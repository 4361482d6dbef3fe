"""Trying a block instead of guessing: does it treat every token alike?"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mst.ops.context import AutocastState, RNGState
from lightning_mst.rewrite.fsdp1 import is_fsdp1_unit
from lightning_mst.rewrite.modes import eval_mode, train_mode
from lightning_mst.rewrite.shadow import original_method
from lightning_mst.rewrite.stand_in import is_out_of_reach, stand_in
from lightning_mst.rewrite.structure import capacity_limit, expert_counts

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
_TOKENS, _CUT = 5, 2


@dataclass(frozen=True)
class Verdict:
    """What a probe found out.

    Attributes:
        reason: why the block can't run in mini-sequences, or ``None`` if it can.
        width: the D with which it ran.
        outputs: how many values the block returns; 0 if it returns one tensor and no tuple.
        routers: names of the submodules that score the experts.
        parts: names of the children that ran.
        counts_tokens: whether what the block does depends on how many tokens there are, so that its pieces must not be
            rewritten either.
    """

    reason: str | None
    width: int = 0
    outputs: int = 0
    routers: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    counts_tokens: bool = False


def probe(module: nn.Module, widths: Iterable[int], *, method: str = "forward", keeps_width: bool = True) -> Verdict:
    """Runs a few random tokens through a block, as a whole and in two pieces.

    Args:
        module: the module that the block is, or of which it is a method. Its mode, its buffers and the random number
            generators are left as they were. Where its weights are out of reach (meta device, sharded), a copy with
            random weights on the CPU is tried.
        widths: values of D to try, the likeliest first. The block is a function of one or more tensors
            (1, tokens, D).
        method: the method that is the block.
        keeps_width: whether the first output must be D wide.

    Returns:
        The verdict.
    """
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()):
        return Verdict("mixes tokens (batch normalisation)")
    if any(is_fsdp1_unit(part) for part in module.modules()):
        return Verdict("FSDP made it, or a part of it, a unit of its own before the rewrite")
    limit = capacity_limit(module) if expert_counts(module) else None
    if limit is not None:
        return Verdict(f"its experts take a limited number of tokens ({limit})", counts_tokens=True)
    likeliest = None
    for width in widths:
        verdict = _try_width(module, width, method, keeps_width)
        if verdict.reason is None:
            return verdict
        likeliest = likeliest or verdict
    return likeliest or Verdict("no width of its linear layers leads away and back")


def _try_width(module: nn.Module, width: int, method: str, keeps_width: bool) -> Verdict:
    verdict = Verdict(None, width)
    if not is_out_of_reach(module):
        verdict = _try(module, width, method, keeps_width)
    if verdict.reason is None and (is_out_of_reach(module) or all(p.is_floating_point() for p in module.parameters())):
        # Fresh weights may be zeros, or so small that what one token does to another drowns in rounding. Random ones
        # of the usual size are not.
        second = _try(stand_in(module), width, method, keeps_width)
        if is_out_of_reach(module) or (second.reason is not None and "does not run" not in second.reason):
            return second
    return verdict


def _try(module: nn.Module, width: int, method: str, keeps_width: bool) -> Verdict:
    trial = _Trial(module, width, method, keeps_width)
    weights = [p for p in module.parameters() if p.is_floating_point()]
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    dtype = weights[0].dtype if weights else torch.float32
    # Rounding may send a token to another expert in one of the runs; a block that mixes tokens does so every time.
    verdict = Verdict(None)
    for seed in range(3):
        with torch.no_grad(), AutocastState.now(device).disabled(), RNGState(device).replayed():
            generator = torch.Generator().manual_seed(seed)
            inputs = [
                torch.randn(1, _TOKENS, width, generator=generator).to(device, dtype) for _ in range(trial.num_inputs)
            ]
            verdict = trial.run(inputs)
        if verdict.reason is None or "mixes" not in verdict.reason:
            break
    return verdict


@dataclass
class _Trial:
    module: nn.Module
    width: int
    method: str
    keeps_width: bool
    _calls: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def forward(self) -> Callable[..., Any]:
        return original_method(self.module, self.method)

    @property
    def num_inputs(self) -> int:
        parameters = inspect.signature(self.forward).parameters.values()
        required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return max(1, len(required))

    def run(self, inputs: Sequence[Tensor]) -> Verdict:
        self._calls.clear()
        before = [b.clone() for b in self.module.buffers()]
        try:
            with eval_mode(self.module):
                with self._noting():
                    whole = self.forward(*inputs)
                with without_hooks(self.module):
                    pieces = [
                        self.forward(*(t[:, :_CUT] for t in inputs)),
                        self.forward(*(t[:, _CUT:] for t in inputs)),
                    ]
            if before:
                with train_mode(self.module), without_hooks(self.module):
                    self.forward(*inputs)
        except Exception as error:  # whatever a stranger's forward raises is the answer, and is shown
            return Verdict(f"does not run on (1, tokens, D) alone ({type(error).__name__}: {first_line(error)})")
        finally:
            changed = [
                name
                for (name, now), then in zip(self.module.named_buffers(), before, strict=True)
                if not torch.equal(now, then)
            ]
            for now, then in zip(self.module.buffers(), before, strict=True):
                now.copy_(then)
        if changed:
            return Verdict(f"remembers earlier tokens (running it changes its buffer {changed[0]})")
        return self._judge(whole, pieces)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Takes note of what every submodule returns."""

        def note(name: str) -> Callable[..., None]:
            return lambda _module, _args, output: self._calls.setdefault(name, []).append(output)

        with without_hooks(self.module):
            for name, part in self.module.named_modules():
                if name:
                    part.register_forward_hook(note(name))
            yield

    def _judge(self, whole: Any, pieces: list[Any]) -> Verdict:
        is_tuple = isinstance(whole, tuple)
        first = whole[0] if is_tuple and whole else whole
        # Some experts return (tokens, D) and leave it to their layer to put the batch back.
        right = isinstance(first, Tensor) and first.shape[:-1] in ((1, _TOKENS), (_TOKENS,))
        if not right or (self.keeps_width and first.shape[-1] != self.width):
            got = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
            return Verdict(f"does not map D to D (a probe of shape {(1, _TOKENS, self.width)} gave {got})")
        for index, value in enumerate(whole if is_tuple else (whole,)):
            if value is None:
                continue
            parts = [piece[index] if is_tuple else piece for piece in pieces]
            reason = _why_different(value, parts)
            if reason is not None:
                return Verdict(reason)
        return Verdict(
            None,
            self.width,
            outputs=len(whole) if is_tuple else 0,
            routers=self._routers(),
            parts=tuple(name for name in self._calls if "." not in name),
        )

    def _routers(self) -> tuple[str, ...]:
        counts = expert_counts(self.module)

        def scores(output: Any) -> bool:
            values = output if isinstance(output, tuple) else (output,)
            return any(isinstance(v, Tensor) and v.dim() > 1 and v.shape[-1] in counts for v in values)

        return tuple(name for name, calls in self._calls.items() if len(calls) == 1 and scores(calls[0]))


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Runs the body with a module's and its submodules' hooks asleep: a trial is nobody's business."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    asleep = [(part, kind, getattr(part, kind)) for part in module.modules() for kind in kinds]
    for part, kind, hooks in asleep:
        setattr(part, kind, type(hooks)())
    try:
        yield
    finally:
        for part, kind, hooks in asleep:
            setattr(part, kind, hooks)


def _why_different(whole: Any, pieces: list[Any]) -> str | None:
    tokens_first = isinstance(whole, Tensor) and whole.shape[:1] == (_TOKENS,)
    if not isinstance(whole, Tensor) or not (tokens_first or whole.shape[:2] == (1, _TOKENS)):
        return f"returns something that has no entry per token ({_describe(whole)})"
    joined = torch.cat(pieces, dim=0 if tokens_first else 1)
    if not whole.is_floating_point():
        return None if torch.equal(whole, joined) else "mixes tokens (a probe in two pieces chose otherwise)"
    if not torch.isfinite(whole).all() or not whole.any():
        return None
    difference = (whole - joined).abs().max() / whole.abs().max()
    if difference > TOLERANCE.get(whole.dtype, 5e-2):
        return f"mixes tokens (a probe in two pieces differs by {difference.item():.2g} of the largest output)"
    return None


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def first_line(error: Exception) -> str:
    """The beginning of an error's message, for a reason in the table."""
    return (str(error).splitlines() or [""])[0][:100]
