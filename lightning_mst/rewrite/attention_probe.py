"""Trying an attention module instead of guessing: is all of it but the attention itself token-wise?"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_mst.ops.context import AutocastState, RNGState
from lightning_mst.ops.linear_reads import find_linear_reads
from lightning_mst.rewrite.attention import Arguments, AttentionParts, in_turn, project, rewrite_attention
from lightning_mst.rewrite.attention_interface import uses_interface, with_attention
from lightning_mst.rewrite.modes import eval_mode, train_mode
from lightning_mst.rewrite.probe import TOLERANCE, first_line, without_hooks
from lightning_mst.rewrite.shadow import restore
from lightning_mst.rewrite.stand_in import is_out_of_reach, stand_in, units_inside

_BATCH, _TOKENS, _CHUNKS = 2, 5, 3


def probe_attention(module: nn.Module, widths: Iterable[int]) -> AttentionParts | str:
    """Runs a few random tokens through an attention module as it is and in mini-sequences.

    Outputs are compared with the module's own weights, gradients with a copy's on the CPU, whose weights are random.

    Args:
        module: the module. It is left as it was.
        widths: values of D to try, the likeliest first.

    Returns:
        What it does before and after its attention, or why it must be left as it is.
    """
    if not uses_interface(module):
        return "does not call its attention by transformers' interface"
    if (units := units_inside(module)) is not None:
        return units
    try:
        twin = _twin(module)
    except RuntimeError as error:  # it holds what torch can't copy, such as a state with a graph
        return f"can't be copied for a trial ({first_line(error)})"
    likeliest: str | None = None
    for width in widths:
        for rotary in _rotary_widths(module):
            try:
                return _Trial(module, twin, width, rotary).parts()
            except _Differs as error:
                return str(error)
            except Exception as error:  # whatever a stranger's forward raises is the answer, and is shown
                what = f"{type(error).__name__}: {first_line(error)}"
                likeliest = likeliest or f"does not run on hidden states and a rotary embedding ({what})"
    return likeliest or "no width of the model's fits it"


class _Differs(Exception):
    """In mini-sequences the module does not compute the same."""


def _twin(module: nn.Module) -> nn.Module:
    twin = stand_in(module)
    generator = torch.Generator().manual_seed(1)
    for parameter in twin.parameters():
        if parameter.dim() == 2:
            # A stand-in's rows are all the same, and with them all heads. Here each is the one before it, moved on.
            values = torch.randn(sum(parameter.shape), generator=generator) * parameter.shape[-1] ** -0.5
            parameter.data = values.as_strided(parameter.shape, (1, 1))
        parameter.requires_grad_(parameter.is_floating_point())
    return twin


def _rotary_widths(module: nn.Module) -> list[int]:
    """How wide the rotary embedding may be, the likeliest first: all of a head, or a part that the module names."""
    parts = [getattr(module, name, None) for name in ("rotary_ndims", "rotary_dim", "qk_rope_head_dim", "head_dim")]
    # Not by getattr: where layers differ, a configuration may refuse to speak for all of them.
    config: dict[str, Any] = vars(module.config)
    parts.append(config.get("head_dim"))
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if isinstance(heads, int) and isinstance(width, int):
        parts.append(width // heads)
    whole = [part for part in parts if isinstance(part, int) and part > 1]
    # Some leave it to the module to use each angle twice.
    return list(dict.fromkeys([*whole, *(part // 2 for part in whole)]))


@dataclass
class _Heard:
    """Attention in plain torch, which takes note of what it is told, and whether it was called."""

    options: dict[str, Any] = field(default_factory=dict)
    was_called: bool = False
    output: Tensor | None = None

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, None]:
        self.options, self.was_called = options, True
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores + mask
        output = (scores.softmax(-1) @ value).transpose(1, 2).contiguous()
        self.output = output.detach()
        return output, None


class _SureDropout(TorchFunctionMode):
    """Lets dropout scale what it is given and draw nothing, so that two runs show whether it is in both of them."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func not in (F.dropout, torch.dropout):
            return func(*args, **(kwargs or {}))
        bound = _DROPOUT.bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        x, p, training = bound.args[:3]
        return x * (1 - p / 2) if training else x * 1


_DROPOUT = inspect.signature(F.dropout)


@dataclass
class _Trial:
    module: nn.Module
    twin: nn.Module
    width: int
    rotary: int

    def parts(self) -> AttentionParts:
        with AutocastState.now(torch.device("cpu")).disabled(), train_mode(self.twin), _SureDropout():
            parts = self._structure()
            self._compare(self.twin, parts, gradients=True)
        if not is_out_of_reach(self.module):
            device = next(self.module.parameters()).device
            with AutocastState.now(device).disabled(), eval_mode(self.module), torch.no_grad():
                self._compare(self.module, parts, gradients=False)
        return parts

    def _structure(self) -> AttentionParts:
        heard = _Heard()
        after: list[str] = []

        def note(name: str) -> Any:
            return lambda *_: after.append(name) if heard.was_called else None

        handles = [child.register_forward_hook(note(name)) for name, child in self.twin.named_children()]
        kwargs = self._kwargs(self.twin)
        with torch.no_grad(), with_attention(self.twin, heard):
            result = self.twin.forward(**kwargs)
        for handle in handles:
            handle.remove()
        if not heard.was_called:
            raise _Differs("does not call its attention by transformers' interface")
        arguments = Arguments(self.twin, (), kwargs)

        def run(*tokens: Tensor) -> Any:
            return project(self.twin, arguments, tokens, {})

        last = [self.twin.get_submodule(name) for name in after]
        assert heard.output is not None
        merged = heard.output.flatten(2).requires_grad_()
        return AttentionParts(
            after=tuple(after),
            returns_weights=isinstance(result, tuple),
            reads=find_linear_reads(run, arguments.tokens),
            reads_after=find_linear_reads(partial(in_turn, last), [merged]),
        )

    def _compare(self, module: nn.Module, parts: AttentionParts, *, gradients: bool) -> None:
        heard, again = _Heard(), _Heard()
        expected = self._run(module, heard, gradients)
        rewrite_attention(module, _CHUNKS, parts)
        try:
            got = self._run(module, again, gradients)
        finally:
            restore(module)
        if heard.options.keys() != again.options.keys() or not all(
            _same(value, again.options[name]) for name, value in heard.options.items()
        ):
            raise _Differs("says something else to its attention when it runs in mini-sequences")
        for what, one, other in zip(("output", "gradient"), expected, got, strict=False):
            tolerance = TOLERANCE.get(one.dtype, 5e-2)
            difference = (one - other).abs().max() / one.abs().max()
            if not difference <= tolerance:
                raise _Differs(f"is not token-wise around its attention (its {what} differs by {difference:.2g})")

    def _run(self, module: nn.Module, attention: _Heard, gradients: bool) -> list[Tensor]:
        kwargs = self._kwargs(module)
        x = next(iter(kwargs.values()))
        with without_hooks(module), with_attention(module, attention), RNGState(x.device).replayed():
            result = module.forward(**kwargs)
            output = result[0] if isinstance(result, tuple) else result
            if isinstance(result, tuple) and len(result) != 2:
                raise _Differs(f"returns {len(result)} values; only (output, weights) is known")
            if not isinstance(output, Tensor) or output.shape != x.shape:
                raise _Differs("does not map D to D")
            output = output + 0  # what was put off is computed
            if not gradients:
                return [output]
            direction = torch.linspace(-1, 1, output.numel(), device=x.device).reshape(output.shape)
            return [output.detach(), *torch.autograd.grad(output, x, direction.to(output.dtype))]

    def _kwargs(self, module: nn.Module) -> dict[str, Any]:
        """The arguments of a call, the hidden states first."""
        parameter = next(p for p in module.parameters() if p.is_floating_point())
        device, dtype = parameter.device, parameter.dtype
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_BATCH, _TOKENS, self.width, generator=generator).to(device, dtype)
        angles = torch.randn(1, _TOKENS, self.rotary, generator=generator)
        mask = torch.full((_TOKENS, _TOKENS), -1e4).triu(1)[None, None]
        known = {
            "position_embeddings": (angles.cos().to(device, dtype), angles.sin().to(device, dtype)),
            "attention_mask": mask.to(device, dtype),
            "position_ids": torch.arange(_TOKENS, device=device)[None],
        }
        first, *others = inspect.signature(module.forward).parameters.values()
        kwargs: dict[str, Any] = {first.name: x.requires_grad_()}
        for parameter_of in others:
            if parameter_of.name in known:
                kwargs[parameter_of.name] = known[parameter_of.name]
            elif parameter_of.default is parameter_of.empty and parameter_of.kind is not parameter_of.VAR_KEYWORD:
                kwargs[parameter_of.name] = None
        return kwargs


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)
