"""Frozen quantized weights with adapters, as the paper's table of quantized models has them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from benchmarks.paper import form
from benchmarks.paper.form import Form
from lightning_mst.memory.moving import fake_modules_move
from lightning_mst.memory.quantized import quantize_fake


def prepare(weights: str, which: Form | None = None) -> Callable[[nn.Module], nn.Module]:
    """What quantizes a fake model, adds adapters to it, and puts it into a form of the paper's code if one is given.

    The paper names bitsandbytes and neither the adapters nor their rank: LoRA of rank 16 on all linear layers but the
    head (``conf/adapter/lora.yaml``).
    """

    def prepared(model: nn.Module) -> nn.Module:
        from peft import LoraConfig, inject_adapter_in_model

        model = quantize_fake(model, weights)
        names = sorted(
            {name.rpartition(".")[2] for name, part in model.model.named_modules() if hasattr(part, "in_features")}
        )
        with fake_modules_move():
            model = inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules=names), model)
        if which is None:
            return model
        # Reentrant checkpoints want an input that has a gradient: `enable_input_require_grads()` of transformers.
        model.model.embed_tokens.register_forward_hook(_ask_for_gradient)
        return form.prepare(which)(model)

    return prepared


def _ask_for_gradient(module: nn.Module, args: object, output: Tensor) -> None:
    output.requires_grad_(True)
