"""Causal language models to train: from a transformers configuration, or from trained weights."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "check_positions",
    "check_vocabulary",
    "count_parameters",
    "from_config",
    "from_pretrained",
    "loss_of",
    "num_positions",
    "takes_use_cache",
]


def from_config(
    config: PreTrainedConfig,
    *,
    shrink: int = 1,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype | str | None = None,
) -> nn.Module:
    """Build a causal language model with random weights, in train mode.

    Args:
        config: A transformers configuration, such as ``LlamaConfig(hidden_size=256, ...)``.
        shrink: Build a model of the same proportions whose widths are so many times smaller: the hidden size, that of
            the MLPs, that of attention (fewer heads, then smaller ones) and the vocabulary. Its depth stays.
        attn_implementation: ``"sdpa"``, ``"eager"``, ``"flex_attention"``, ``"flash_attention_2"``, ...
        dtype: Of the weights, such as ``torch.bfloat16`` or ``"bfloat16"``. Default: torch's default dtype, which
            ``Trainer.init_module()`` sets according to the trainer's precision.

    Returns:
        The model, on the device that is current (``torch.device`` as a context manager, ``Trainer.init_module()``).

    Raises:
        ValueError: transformers knows no causal language model of this configuration, the model does not support this
            kind of attention, torch has no such dtype, or a size does not divide by ``shrink``.
    """
    from transformers import AutoModelForCausalLM

    if shrink != 1:
        config = _shrunk(config, shrink)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, dtype=_dtype_of(dtype))
    return model.train()


_WIDTHS = ("hidden_size", "intermediate_size", "vocab_size")
_HEADS = ("num_attention_heads", "num_key_value_heads")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def _shrunk(config: PreTrainedConfig, factor: int) -> PreTrainedConfig:
    """A copy with smaller widths, whose ratios are those of the original."""
    if not isinstance(factor, int) or factor < 1:
        raise ValueError(f"shrink should be a whole number, 1 or more, got {factor!r}")
    missing = [name for name in (*_WIDTHS, *_HEADS) if not isinstance(getattr(config, name, None), int)]
    if missing:
        raise ValueError(f"shrink={factor}: {type(config).__name__} does not say {', '.join(missing)}. Set shrink=1")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Queries share keys in groups of the same size as before, so heads go by what divides both of their numbers.
    fewer = math.gcd(factor, *(getattr(config, name) for name in _HEADS))
    divisors = {**dict.fromkeys(_WIDTHS, factor), **dict.fromkeys(_HEADS, fewer), "head_dim": factor // fewer}
    sizes = {name: head_dim if name == "head_dim" else getattr(config, name) for name in divisors}
    wrong = [f"{name}={sizes[name]} by {divisor}" for name, divisor in divisors.items() if sizes[name] % divisor]
    if wrong:
        raise ValueError(f"shrink={factor} would divide {', '.join(wrong)}: not whole numbers. Choose another shrink")
    small = copy.deepcopy(config)
    for name, divisor in divisors.items():
        setattr(small, name, sizes[name] // divisor)
    for name in _TOKENS:
        if isinstance(token := getattr(small, name, None), int) and token >= small.vocab_size:
            setattr(small, name, None)
    return small


def from_pretrained(
    name: str,
    *,
    revision: str | None = None,
    random_weights: bool = False,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a causal language model, in train mode.

    transformers hands trained models over in eval mode, where its activation checkpointing is silently off.

    Args:
        name: A name on the Hugging Face hub, or a local folder that ``save_pretrained`` wrote.
        revision: Branch, tag or commit on the hub.
        random_weights: Read the configuration only, and start from random weights.
        attn_implementation: As in :func:`from_config`.
        dtype: Of the weights, whatever they were stored in. Default: as in :func:`from_config`.
        trust_remote_code: Run model code that lies beside the weights.

    Raises:
        OSError: There is no such model, or it cannot be reached.
        ValueError: torch has no such dtype.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    options = {"attn_implementation": attn_implementation, "dtype": _dtype_of(dtype)}
    if random_weights:
        config = AutoConfig.from_pretrained(name, **source)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)
    else:
        # Onto the CPU first: under a device context transformers would want the accelerate package.
        with torch.device("cpu"):
            model = AutoModelForCausalLM.from_pretrained(name, **source, **options)
    return model.train()


def _dtype_of(dtype: torch.dtype | str | None) -> torch.dtype:
    """What a dtype's name stands for; the default dtype for None."""
    if dtype is None:
        return torch.get_default_dtype()
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype should be float32, bfloat16, float16 or float64, got {dtype!r}")
    return found


def count_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Number of weights; several weights that bitsandbytes packed into one byte count as many.

    Args:
        model: Any module.
        trainable: Only those that get a gradient.
    """
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad or not trainable]
    states = [getattr(parameter, "quant_state", None) for parameter in chosen]
    return sum(p.numel() if s is None else s.shape.numel() for p, s in zip(chosen, states, strict=True))


def check_vocabulary(model: nn.Module, vocab_size: int) -> None:
    """Make sure that the model has an embedding for every token id.

    Without this check a CPU run ends in an index error and a GPU run in a device-side assertion, neither of which
    names the cause. A model without ``get_input_embeddings`` is not checked.

    Args:
        model: The language model.
        vocab_size: Number of entries of the tokenizer.

    Raises:
        ValueError: The tokenizer has more entries than the model's embedding.
    """
    get_embeddings = getattr(model, "get_input_embeddings", None)
    if get_embeddings is None:
        return
    rows = get_embeddings().weight.shape[0]
    if vocab_size > rows:
        raise ValueError(
            f"The tokenizer has {vocab_size} entries, but the model's embedding has only {rows}. Use the model's own"
            f" tokenizer (data.tokenizer=NAME), train a smaller one (data.vocab_size={rows}), or give a model with"
            f" random weights a larger vocabulary (model.config.vocab_size={vocab_size})."
        )


def num_positions(model: nn.Module) -> int | None:
    """How many positions a model has learned, or ``None``: rotary positions are computed, so that any length runs."""
    config = getattr(model, "config", None)
    return None if getattr(config, "rope_parameters", None) else getattr(config, "max_position_embeddings", None)


def check_positions(model: nn.Module, sequence_length: int) -> None:
    """Make sure that a model with learned positions has one for every token of a sequence.

    Args:
        model: The language model.
        sequence_length: Tokens per sequence.

    Raises:
        ValueError: The sequences are longer than the model's table of positions.
    """
    positions = num_positions(model)
    if positions is not None and sequence_length > positions:
        raise ValueError(
            f"The sequences have {sequence_length} tokens, but the model has learned positions for only {positions}."
            f" Set data.sequence_length={positions} or less."
        )


def takes_use_cache(model: nn.Module) -> bool:
    """Whether ``forward`` understands ``use_cache``, by name or (wrapped models) because its configuration has it."""
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters:
        return True
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return takes_any and hasattr(getattr(model, "config", None), "use_cache")


def loss_of(output: Any) -> Tensor:
    """The loss in what a model returned."""
    if isinstance(output, Mapping):  # transformers' outputs are mappings, too
        loss = output.get("loss")
    elif isinstance(output, (tuple, list)):
        loss = output[0] if output else None
    else:
        loss = getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(
            f"Given input_ids and labels, the model should return its loss (one number), got {got} in a"
            f" {type(output).__name__}. Return the loss, (loss, ...), or an object with `.loss`."
        )
    return loss
