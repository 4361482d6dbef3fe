"""DeepSpeed's ZeRO-3: the weights of a rewritten block are gathered once for all its mini-sequences.

ZeRO-3 keeps every weight in pieces and gathers a module's own around its forward and its backward. Left alone, the
matrices of an MLP would come and go with every mini-sequence, and what runs them over all mini-sequences would hold
none. So whoever is entered before the first mini-sequence and left after the last, the owner, gathers for all:

1. The block's weights become external parameters of the owner: DeepSpeed then gathers them with the owner's.
2. The modules that hold them lose their own hooks.

The owner is the block itself, if it is one module, and else the decoder layer: of two projections, of a method, and of
an MLP with the norm after it.

Gradients go the usual way: one for each weight, reduced when autograd has added it up. DeepSpeed's own mark for such
modules (``set_z3_leaf_module``) instead reduces them in a hook on the module's input, which comes too early if that
needs no gradient, and too often if the module is called twice.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_mst.rewrite.attention import AttentionForm
from lightning_mst.rewrite.handle import MSTHandle
from lightning_mst.rewrite.joining import FirstForm, JoiningForm
from lightning_mst.rewrite.lm_head import LMHeadForm
from lightning_mst.rewrite.mlp import MLPForm
from lightning_mst.rewrite.norms import NormForm
from lightning_mst.rewrite.shadow import BoundMethod, form_of, shadowed


def gather_whole_blocks(handle: MSTHandle) -> list[nn.Module]:
    """Lets ZeRO-3 gather all weights of a rewritten block at once, and release them after its last mini-sequence.

    To be called after each ``deepspeed.initialize``. A model on which ZeRO-3 has not started is left alone. The change
    stays when the handle is removed, and serves the unmodified model as well.

    Args:
        handle: of the rewritten model.

    Returns:
        The modules that gather for others.
    """
    from deepspeed import zero

    owners: dict[nn.Module, None] = {}
    for owner, block in list(_blocks(handle)):
        # DeepSpeed numbers the modules that it hooks.
        if not hasattr(owner, "ds_id"):
            continue
        for part in block.modules():
            if part is owner:
                continue
            _remove_hooks(part)
            for parameter in part.parameters(recurse=False):
                zero.register_external_parameter(owner, parameter)
            owners[owner] = None
    return list(owners)


def _blocks(handle: MSTHandle) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Each owner with a module that it gathers for."""
    layer_of = {module: layer for layer in handle.layers for module in layer.modules()}
    for module in shadowed(handle.model):
        for name, value in vars(module).items():
            form = form_of(module, name) if isinstance(value, BoundMethod) else None
            is_outside = isinstance(form, NormForm) and module not in layer_of
            if isinstance(form, LMHeadForm) or is_outside or (isinstance(form, MLPForm) and _is_whole(module, form)):
                yield module, module
            elif isinstance(form, (MLPForm, FirstForm, JoiningForm, NormForm, AttentionForm)):
                layer = layer_of[module]
                yield from ((layer, part) for part in (form.parts if isinstance(form, MLPForm) else [module]))
                # Activations and dropouts in between: under hooks they would take the deferred output for a real one.
                yield from ((layer, part) for part in layer.modules() if not any(True for _ in part.parameters()))


def _is_whole(module: nn.Module, form: MLPForm) -> bool:
    return form.parts == [module] and not form.is_followed


def _remove_hooks(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "__module__", "").startswith("deepspeed."):
                del hooks[key]
