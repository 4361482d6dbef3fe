"""Stopping an attention module where it hands queries, keys and values to transformers' attention interface.

Modules of this kind project and rotate, then look up a function by the name in their configuration and call it with
queries, keys and values. A name of our own in its place lets us have these and nothing after them, from the module's
own code, whatever its projections are called and made of.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_NAME = "lightning_mst_projections"
"""Under which transformers finds the function that stops a module."""

Attention = Callable[..., tuple[Tensor, Any]]
"""(module, query, key, value, mask, **options) to ((B, S, H, d), weights); query (B, H, S, d)."""


class Projected(BaseException):
    """An attention module has come as far as its queries, keys and values. No error: who asked for it catches it.

    Attributes:
        heads: query (B, H, S, d), key (B, H_kv, S, d) and value (B, H_kv, S, d_v).
        options: what the module says beside these and the mask: scaling, window, ...
    """

    def __init__(self, heads: tuple[Tensor, Tensor, Tensor], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.heads = heads
        self.options = options


class _Config:
    """A module's configuration with another attention."""

    def __init__(self, config: Any, attention: Attention) -> None:
        self._config = config
        self._attn_implementation = _NAME
        self.mst_attention = attention

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def uses_interface(module: nn.Module) -> bool:
    """Whether a module calls its attention by transformers' interface."""
    if not hasattr(getattr(module, "config", None), "_attn_implementation"):
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def attention_of(module: nn.Module) -> Attention:
    """The function that a module's configuration names."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = module.config._attn_implementation
    # Each model brings its own "eager" one, which stands beside the module's class under this name.
    found: Attention = ALL_ATTENTION_FUNCTIONS.get(name) or _globals_of(module)["eager_attention_forward"]
    return found


def is_by_heads(module: nn.Module, mask: Any, options: Mapping[str, Any]) -> bool:
    """Whether heads may be given to a module's attention one group after the other.

    Args:
        module: the module.
        mask: the attention mask.
        options: what the module says to its attention besides.
    """
    shape: tuple[int, ...] = getattr(mask, "shape", ())
    # A model's own function may use what the module holds for each head, and a tensor may have an entry for each.
    knows_heads = any(isinstance(value, Tensor) and name not in _OF_TOKENS for name, value in options.items())
    return module.config._attn_implementation != "eager" and not knows_heads and (len(shape) < 4 or shape[1] == 1)


_OF_TOKENS = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "cache_position")


@contextmanager
def with_attention(module: nn.Module, attention: Attention) -> Iterator[None]:
    """Lets a module call another attention function while the body runs."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _dispatch)
    entries = module.__dict__
    before = entries["config"]
    entries["config"] = _Config(before, attention)
    try:
        yield
    finally:
        entries["config"] = before


def _dispatch(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    attention: Attention = module.config.mst_attention
    return attention(module, *args, **kwargs)


def stop(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
    """An attention function that computes nothing and hands its arguments to who called the module."""
    raise Projected((query, key, value), options)


def _globals_of(module: nn.Module) -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
    return found
