"""An LM head that FSDP1 made a unit of its own: a loss asks the unit, whose weights are at hand only while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_mst.ops.heads import ModuleHead
from lightning_mst.rewrite.fsdp1 import FirstViews, is_fsdp1_unit
from lightning_mst.rewrite.lm_head import REQUEST, LMHeadForm, deferred, head_of, hidden_states_of, probed_logits
from lightning_mst.rewrite.shadow import BoundMethod, form_of, original_forward, shadow_method


@dataclass
class _UnitForm(LMHeadForm):
    """Of a unit and of the head in it."""

    views: FirstViews = field(default_factory=FirstViews)


def ask_units(model: nn.Module) -> None:
    """Lets a rewritten LM head that is a unit of its own have its losses computed while the unit has its weights.

    To be called after FSDP1 has wrapped a rewritten model.

    Args:
        model: the wrapped model.
    """
    for unit in filter(is_fsdp1_unit, model.modules()):
        head = unit.module
        if not isinstance(vars(head).get("forward"), BoundMethod) or not isinstance(form_of(head), LMHeadForm):
            continue
        form = _UnitForm(**vars(form_of(head)))
        shadow_method(head, _head_forward, form)
        shadow_method(unit, _unit_forward, form)


def _unit_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """FSDP1 sees only the calls that need the weights: it would gather them for others, too."""
    hidden = hidden_states_of(args, kwargs)
    if hidden is None:
        # A request too.
        return original_forward(self)(*args, **kwargs)
    # However few the logits are: were they deferred on some ranks only, ranks would gather in different orders.
    form: _UnitForm = form_of(self)
    # In evaluation, FSDP1 can be told to do without mixed precision.
    vocab_size, dtype = probed_logits(original_forward(self), hidden, form, ("unit", self.training))
    outline = ModuleHead(original_forward(self), tuple(self.parameters()), vocab_size, dtype)
    return deferred(self, form, hidden, outline)


def _head_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Runs inside the unit's forward, with the weights gathered."""
    form_of(self).views.use_in(self)
    if REQUEST not in kwargs:
        return original_forward(self)(*args, **kwargs)
    (hidden,) = args
    # Under no_grad unless the answer has a graph: FSDP1 takes it from the last answer whether backward gathers weights.
    return kwargs[REQUEST](hidden, head_of(self, hidden))
