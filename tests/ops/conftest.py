from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled(), "the test left gradients disabled"
    assert not torch.is_autocast_enabled("cpu"), "the test left autocast on"
