"""DeepSpeed's ZeRO-3: the weights of a rewritten block are gathered once for all its mini-sequences.

ZeRO-3 keeps every weight in pieces and gathers a module's own before its forward and before its backward. Left alone,
the matrices of an MLP would come and go with every mini-sequence, and what runs them over all of them would hold none.
But DeepSpeed can take a module for a leaf: all weights in it are then gathered when it is entered, and released when
it is left. Such a leaf is

1. an MLP or an LM head that is a module: that module;
2. what a decoder layer makes of several modules (two projections, a method, an MLP with the norm after it): the layer,
   because nothing smaller is entered before the first of them and left after the last.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_mst.rewrite.handle import MSTHandle
from lightning_mst.rewrite.joining import _FirstForm
from lightning_mst.rewrite.lm_head import _LMHeadForm
from lightning_mst.rewrite.mlp import _MLPForm
from lightning_mst.rewrite.shadow import BoundMethod, form_of, shadowed


def gather_whole_blocks(handle: MSTHandle) -> list[nn.Module]:
    """Lets ZeRO-3 gather all weights of a rewritten block at once, and release them after its last mini-sequence.

    To be called after ``apply_mst`` and before ``deepspeed.initialize``. It sets marks that DeepSpeed reads when it
    starts with ZeRO-3, and that mean nothing otherwise. They stay when the handle is removed: an engine that has
    started without hooks below a module goes on to rely on the mark.

    Args:
        handle: of the rewritten model.

    Returns:
        The modules that are marked.

    Raises:
        RuntimeError: if ZeRO-3 has started on the model and gathers parts of a block.
    """
    from deepspeed.utils import set_z3_leaf_module

    leaves = list(dict.fromkeys(_leaves(handle)))
    for leaf in leaves:
        hooked = [name for name, part in leaf.named_modules() if part is not leaf and _gathers_itself(part)]
        if hooked:
            raise RuntimeError(
                f"ZeRO-3 has started and gathers {hooked[0]} by itself, but {type(leaf).__name__} now needs its weights "
                "as one for all mini-sequences. Call apply_mst and gather_whole_blocks before deepspeed.initialize."
            )
    for leaf in leaves:
        set_z3_leaf_module(leaf, True)
    return leaves


def _leaves(handle: MSTHandle) -> Iterator[nn.Module]:
    layer_of = {module: layer for layer in handle.layers for module in layer.modules()}
    for module in shadowed(handle.model):
        for name, value in vars(module).items():
            form = form_of(module, name) if isinstance(value, BoundMethod) else None
            if isinstance(form, _LMHeadForm) or (isinstance(form, _MLPForm) and form.parts == [module]):
                yield layer_of[module] if getattr(form, "is_followed", False) else module
            elif isinstance(form, (_MLPForm, _FirstForm)):
                yield layer_of[module]


def _gathers_itself(module: nn.Module) -> bool:
    # DeepSpeed numbers the modules that it hooks, and leaves the number when it takes the hooks away.
    return "ds_id" in vars(module) and bool(module._forward_pre_hooks)
