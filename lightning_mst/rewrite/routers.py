"""What the routers of a mixture of experts say, of the whole sequence and not of its pieces.

Load-balancing losses are taken over all tokens: transformers records each router's output by a hook on it, and so may
a user. When the block runs over mini-sequences, its routers run once per piece and without a graph; whoever listens to
them must hear one output, of all tokens, with a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_mst.rewrite.shadow import BoundMethod, form_of, original_forward, shadow_method


@dataclass
class _RouterForm:
    answer: Any = None


def rewrite_router(router: nn.Module) -> None:
    """Lets a router repeat an answer that it is given, for its listeners."""
    shadow_method(router, _router_forward, _RouterForm())


def _router_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    form: _RouterForm = form_of(self)
    if form.answer is not None:
        return form.answer
    return original_forward(self)(*args, **kwargs)


def has_listeners(router: nn.Module) -> bool:
    """Whether anybody hooks the router's output, or has wrapped its ``forward`` after the rewrite."""
    return bool(router._forward_hooks) or not isinstance(router.__dict__.get("forward"), BoundMethod)


@contextmanager
def overheard(routers: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Runs the body with the listeners asleep, and hands over what each router said.

    Yields:
        A list that holds the output of every router, in order, once the body has run.
    """
    said: list[Any] = [None] * len(routers)

    def ear(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def listen(*args: Any, **kwargs: Any) -> Any:
            said[index] = forward(*args, **kwargs)
            return said[index]

        return listen

    asleep = [(router, router.__dict__["forward"], router._forward_hooks) for router in routers]
    for index, router in enumerate(routers):
        router.__dict__["forward"] = ear(index, original_forward(router))
        router._forward_hooks = type(router._forward_hooks)()
    try:
        yield said
    finally:
        for router, forward, hooks in asleep:
            router.__dict__["forward"] = forward
            router._forward_hooks = hooks


def announce(router: nn.Module, answer: Any, x: Tensor) -> None:
    """Tells the listeners what a router said of the whole sequence.

    Args:
        router: a rewritten router.
        answer: its output.
        x: the block's input (*lead, D), in place of the router's.
    """
    form: _RouterForm = form_of(router)
    form.answer = answer
    try:
        router(x.reshape(-1, x.shape[-1]))
    finally:
        form.answer = None
