import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_mst.ops.deferred_logits import DeferredLogits, DeferredLogitsWarning


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled(), "the test left gradients disabled"
    assert not torch.is_autocast_enabled("cpu"), "the test left autocast on"


@pytest.fixture(autouse=True)
def nobody_has_asked_yet() -> None:
    """The warning is given once per process and function."""
    for name, module in list(sys.modules.items()):
        if name.startswith("lightning_mst.ops") and isinstance(getattr(module, "_asked", None), set):
            module._asked.clear()


@pytest.fixture
def never_real(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def real(self: DeferredLogits, asked_by: str | None = None) -> Tensor:
        raise AssertionError(f"{asked_by} made the logits real")

    monkeypatch.setattr(DeferredLogits, "real", real)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeferredLogitsWarning)
        yield
