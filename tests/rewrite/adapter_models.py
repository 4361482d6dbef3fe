"""Adapters on small models, and what their steps cost."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from rewrite_models import VOCAB, build, gradients, hf_loss
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_mst import apply_mst
from lightning_mst.memory import TensorBytes

MLP = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
HEAD = "lm_head"


def lora(targets: str | list[str] = "all-linear", **options: object) -> LoraConfig:
    """Adapters that already are something: PEFT's start as zeros, and half of their gradients, too."""
    return LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **options
    )


def ia3(targets: list[str]) -> IA3Config:
    return IA3Config(
        task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=[t for t in targets if t == "down_proj"],
        init_ia3_weights=False,
    )  # fmt: skip


ADAPTERS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA on all layers": lora,
    "LoRA on attention": lambda: lora(ATTENTION),
    "LoRA on the MLP": lambda: lora(MLP),
    "DoRA": lambda: lora(use_dora=True),
    "IA3": lambda: ia3(["k_proj", "v_proj", "down_proj"]),
    "head saved": lambda: lora(MLP, modules_to_save=[HEAD]),
    "head and embedding saved": lambda: lora(ATTENTION, modules_to_save=[HEAD, "embed_tokens"]),
    "norms saved": lambda: lora(MLP, modules_to_save=["post_attention_layernorm", "norm"]),
    "LoRA on the head": lambda: lora([*MLP, HEAD]),
    "DoRA on the head": lambda: lora([*MLP, HEAD], use_dora=True),
    "IA3 on the head": lambda: ia3(["down_proj", HEAD]),
}


def add(model: nn.Module, config: PeftConfig) -> nn.Module:
    torch.manual_seed(1)
    # In fp64 the adapters, too.
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def adapted(config: PeftConfig, family: str = "Llama 3", dtype: torch.dtype = torch.float64) -> nn.Module:
    return add(build(family, dtype), config)


def own_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """In the model's dtype; transformers' own loss casts to fp32."""
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[..., :-1, :].reshape(-1, VOCAB), labels[..., 1:].reshape(-1))


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


class Work(TorchDispatchMode):
    """Counts a step's products with some matrices, and lists the tensors of their shapes that it makes.

    Args:
        *shapes: of the matrices, either way round. Products with a matrix of rank r have another dimension.
    """

    def __init__(self, *shapes: tuple[int, int]) -> None:
        super().__init__()
        self.shapes = {frozenset(shape) for shape in shapes}
        self.multiply_adds = 0
        self.made: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            sizes = (a.shape[0], a.shape[1], b.shape[1])
            if any(shape <= set(sizes) for shape in self.shapes):
                self.multiply_adds += sizes[0] * sizes[1] * sizes[2]
        elif name == "gemm_4bit":  # x, packed weight, its shape
            tokens, (rows, columns) = args[0].numel() // args[0].shape[-1], args[2]
            if {rows, columns} in self.shapes:
                self.multiply_adds += tokens * rows * columns
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given and set(t.shape) in self.shapes:
                self.made.append(tuple(t.shape))
        return result


def work_of(model: nn.Module, loss: Callable[[], Tensor], *shapes: tuple[int, int]) -> Work:
    with Work(*shapes) as work:
        gradients(model, loss())
    return work


def step_bytes(model: nn.Module, ids: Tensor, **options: object) -> tuple[int, int]:
    """Bytes that are alive after the forward pass, and at the peak of the step, in the form that the options give."""
    handle = apply_mst(model, **options)
    hf_loss(model, ids, ids).backward()  # bitsandbytes moves its scales at the first call
    model.zero_grad(set_to_none=True)
    with TensorBytes([*model.parameters(), *model.buffers(), ids]) as memory:
        loss = hf_loss(model, ids, ids)
        saved = memory.live
        loss.backward()
    model.zero_grad(set_to_none=True)
    handle.remove()
    return saved, memory.peak
