"""Updates during the backward pass."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_mst.program.errors import ConfigurationError
from lightning_mst.program.optimizer_in_backward import OptimizerInBackward


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    layers[2].weight = layers[0].weight  # tied: one gradient, of two uses
    return layers


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> torch.Tensor:
    data = torch.linspace(-1, 1, 12).view(3, 4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    for _ in range(steps):

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(data).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        scheduler.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_it_gives_the_weights_of_the_ordinary_optimizer(optimizer_class):
    expected_model, model = network(), network()
    expected = train(expected_model, optimizer_class(expected_model.parameters(), lr=0.1, weight_decay=0.1))

    actual = train(
        model, OptimizerInBackward(model.parameters(), optimizer_class=optimizer_class, lr=0.1, weight_decay=0.1)
    )

    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7)


def test_no_gradient_outlives_the_backward_pass():
    model = network()
    optimizer = OptimizerInBackward(model.parameters(), lr=0.1)

    model(torch.ones(1, 4)).sum().backward()

    assert all(parameter.grad is None for parameter in model.parameters())
    assert optimizer.step() is None


def test_its_state_survives_a_checkpoint():
    straight, model = network(), network()
    expected = train(straight, OptimizerInBackward(straight.parameters(), lr=0.1), steps=4)

    first = OptimizerInBackward(model.parameters(), lr=0.1)
    train(model, first, steps=2)
    resumed_model = network()
    resumed_model.load_state_dict(model.state_dict())
    resumed = OptimizerInBackward(resumed_model.parameters(), lr=1.0)
    resumed.load_state_dict(first.state_dict())
    data = torch.linspace(-1, 1, 12).view(3, 4)
    for _ in range(2):
        resumed_model(data).square().mean().backward()

    actual = torch.cat([parameter.detach().flatten() for parameter in resumed_model.parameters()])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"gradient_clip_val": 1.0}, "gradient_clip_val=1.0"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
    ],
)
def test_it_refuses_a_trainer_that_needs_all_gradients(options, named):
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, **options)
    optimizer = OptimizerInBackward(network().parameters(), lr=0.1)

    with pytest.raises(ConfigurationError, match=named):
        optimizer.check_trainer(trainer)
