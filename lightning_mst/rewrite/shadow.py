"""Changing what a module does without touching its structure.

An entry in an instance's ``__dict__`` shadows the class's method. The module keeps its class, children, parameters,
hooks and ``state_dict``; taking the entry away gives back the module as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_KEY = "_mst"


@dataclass
class _State:
    """What was put into a module's ``__dict__``, and what stood there before."""

    forms: dict[str, Any] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    replaced: dict[str, Any] = field(default_factory=dict)


class BoundMethod:
    """A function bound to a module, in place of ``forward`` or another method.

    Unlike a bound method, it survives pickling (a method is pickled as its name, which the class resolves to its own
    ``forward``); unlike a closure, a deepcopied one calls the copy.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module, name: str) -> None:
        self.function = function
        self.module = module
        self.name = name

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the method in whose place this stands: some callers count its arguments."""
        return inspect.signature(original_method(self.module, self.name))

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function on the module."""
        return self.function(self.module, *args, **kwargs)


def shadow(module: nn.Module, name: str, value: Any) -> None:
    """Sets an instance attribute that ``restore`` takes back.

    Args:
        module: the module.
        name: the attribute.
        value: its value for now.
    """
    entries = module.__dict__
    state: _State = entries.setdefault(_KEY, _State())
    if name not in state.added and name not in state.replaced:
        if name in entries:
            state.replaced[name] = entries[name]
        else:
            state.added.append(name)
    entries[name] = value


def shadow_method(module: nn.Module, function: Callable[..., Any], form: Any, name: str = "forward") -> None:
    """Lets a function of (module, ...) run in place of one of the module's methods.

    Args:
        module: the module.
        function: a module-level function, so that it can be pickled.
        form: the function's settings, for ``form_of``.
        name: the method.
    """
    shadow(module, name, BoundMethod(function, module, name))
    module.__dict__[_KEY].forms[name] = form


def form_of(module: nn.Module, name: str = "forward") -> Any:
    """The settings that ``shadow_method`` was given."""
    return module.__dict__[_KEY].forms[name]


def is_shadowed(module: nn.Module, name: str = "forward") -> bool:
    """Whether a module's method runs in another form."""
    state = module.__dict__.get(_KEY)
    return state is not None and name in state.forms


def forms(model: nn.Module) -> Iterator[Any]:
    """The settings of every shadowed method in ``model``."""
    for module in shadowed(model):
        yield from module.__dict__[_KEY].forms.values()


def original_value(module: nn.Module, name: str) -> Any:
    """An attribute's value without the shadow; for methods see ``original_forward``."""
    state: _State = module.__dict__.get(_KEY, _State())
    if name in state.replaced:
        return state.replaced[name]
    return getattr(type(module) if name in state.added else module, name)


def original_method(module: nn.Module, name: str) -> Callable[..., Any]:
    """The method that runs without the shadow."""
    state = module.__dict__.get(_KEY)
    if state is None or (name not in state.added and name not in state.replaced):
        return getattr(module, name)
    if name in state.replaced:
        return state.replaced[name]
    # Looked up at each call: FSDP2 changes the class of a module after the rewrite.
    return getattr(type(module), name).__get__(module)


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """The ``forward`` that runs without the shadow."""
    return original_method(module, "forward")


def shadowed(model: nn.Module) -> Iterator[nn.Module]:
    """All modules in ``model`` that have something shadowed."""
    for module in model.modules():
        if _KEY in module.__dict__:
            yield module


@contextmanager
def lifted(model: nn.Module) -> Iterator[None]:
    """Runs the body with ``model`` as it was before anything in it was shadowed, then puts every shadow back."""
    taken = []
    for module in list(shadowed(model)):
        state: _State = module.__dict__[_KEY]
        entries = {name: module.__dict__[name] for name in (*state.added, *state.replaced)}
        restore(module)
        taken.append((module, state, entries))
    try:
        yield
    finally:
        for module, state, entries in taken:
            module.__dict__[_KEY] = state
            module.__dict__.update(entries)


def restore(module: nn.Module) -> None:
    """Takes back every shadow of one module."""
    state: _State = module.__dict__.pop(_KEY)
    for name in state.added:
        del module.__dict__[name]
    module.__dict__.update(state.replaced)
