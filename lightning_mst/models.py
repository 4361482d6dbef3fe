"""Causal language models to train: from a transformers configuration, or from trained weights."""

from __future__ import annotations

import inspect
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
    attn_implementation: str = "sdpa",
    dtype: torch.dtype | str | None = None,
) -> nn.Module:
    """Build a causal language model with random weights, in train mode.

    Args:
        config: A transformers configuration, such as ``LlamaConfig(hidden_size=256, ...)``.
        attn_implementation: ``"sdpa"``, ``"eager"``, ``"flex_attention"``, ``"flash_attention_2"``, ...
        dtype: Of the weights, such as ``torch.bfloat16`` or ``"bfloat16"``. Default: torch's default dtype, which
            ``Trainer.init_module()`` sets according to the trainer's precision.

    Returns:
        The model, on the device that is current (``torch.device`` as a context manager, ``Trainer.init_module()``).

    Raises:
        ValueError: transformers knows no causal language model of this configuration, the model does not support this
            kind of attention, or torch has no such dtype.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, dtype=_dtype_of(dtype))
    return model.train()


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
