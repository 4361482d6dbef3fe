"""The norm or dropout after an MLP joins its mini-sequences, if nobody else wants what the MLP gave."""

from __future__ import annotations

import pytest
import torch
from families import build
from rewrite_models import (
    Attention,
    FeedForward,
    MatmulCounter,
    PlainTransformer,
    distance,
    furthest,
    gradients,
    hf_loss,
    plain_loss,
)
from torch import Tensor, nn

from lightning_mst import apply_mst

OPTIONS = {"mlp_chunks": 4, "lm_head_chunks": 4}


class Layer(nn.Module):
    """A layer with two MLPs; ``combine`` says what becomes of their outputs."""

    def __init__(self, after: nn.Module) -> None:
        super().__init__()
        self.attention, self.norm, self.after = Attention(48), nn.LayerNorm(48), after
        self.first, self.second = FeedForward(48, 96), FeedForward(48, 96)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return self.combine(x)

    def combine(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Shared(Layer):
    def combine(self, x: Tensor) -> Tensor:
        x = x + self.after(self.first(x))
        return x + self.after(self.second(x))


class Interleaved(Layer):
    def combine(self, x: Tensor) -> Tensor:
        y = self.first(x)
        x = x + self.after(x)
        return x + self.after(y) + self.second(x)


class Twice(Layer):
    def combine(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return x + y + self.after(y) + self.second(x)


class Changed(Layer):
    def combine(self, x: Tensor) -> Tensor:
        return x + self.after(self.first(x) * 2) + self.second(x)


class Deceitful(Layer):
    """Takes its norm along only when it is tried."""

    def combine(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return x + (self.after(y) if x.shape[1] < 6 else self.after(y.softmax(-1))) + self.second(x)


def norm() -> nn.Module:
    result = nn.LayerNorm(48)
    nn.init.constant_(result.weight, 3.0)  # applied twice, it would show
    return result


def model_of(layer: type[Layer], after: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = PlainTransformer(layers=2)
    model.blocks = nn.ModuleList(layer(after) for _ in range(2))
    return model.double()


@pytest.mark.parametrize(
    ("layer", "joined"),
    [
        (Shared, ["after joins it", "after joins it"]),
        (Interleaved, ["after joins it", ""]),
        (Twice, ["", ""]),
        (Changed, ["after joins it", ""]),
    ],
)
@pytest.mark.parametrize("checkpoint_layers", ["all", "none"])
def test_a_norm_joins_the_mlps_whose_output_it_alone_gets(layer, joined, checkpoint_layers, batch):
    model = model_of(layer, norm())
    expected = gradients(model, plain_loss(model, *batch))
    rows = apply_mst(model, checkpoint_layers=checkpoint_layers, **OPTIONS).rows
    assert [row.reason for row in rows if row.block == "MLP"][:2] == joined
    assert distance(gradients(model, plain_loss(model, *batch)), expected) < 1e-10


def test_dropout_after_the_mlp_joins_it_and_checkpointing_stops_before(batch):
    model = model_of(Shared, nn.Dropout(0.5))
    rows = apply_mst(model, **OPTIONS).rows
    assert all(row.reason == "after joins it" for row in rows if row.block == "MLP")
    with MatmulCounter(96) as counter:
        plain_loss(model, *batch).backward()
    one_pass = batch[0].numel() * 2 * 4 * 48 * 96
    # The first MLP of a layer runs again for what is between the two, the second does not.
    assert counter.total <= 4.5 * one_pass
    model.eval()
    expected = gradients(model, plain_loss(model, *batch))
    apply_mst(model, mlp_chunks=None, lm_head_chunks=None)
    assert distance(gradients(model, plain_loss(model, *batch)), expected) < 1e-10


def test_a_layer_that_does_otherwise_than_in_its_trial_is_exact_all_the_same(batch):
    model = model_of(Deceitful, norm())
    expected = gradients(model, plain_loss(model, *batch))
    rows = apply_mst(model, **OPTIONS).rows
    assert rows[0].reason == "after joins it"
    assert distance(gradients(model, plain_loss(model, *batch)), expected) < 1e-10


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_an_mlp_with_a_hook_does_its_work_inside(register, batch):
    """FSDP gathers a unit's weights in such hooks, and a user may look at the output in one."""
    model = model_of(Shared, norm())
    expected = gradients(model, plain_loss(model, *batch))
    seen: list[type] = []
    for block in model.blocks:
        getattr(block.first, register)(lambda _m, *values: seen.append(type(values[-1])) or None)
    apply_mst(model, **OPTIONS)
    assert distance(gradients(model, plain_loss(model, *batch)), expected) < 1e-10
    assert set(seen) == {Tensor if register == "register_forward_hook" else tuple}


def test_two_projections_of_which_the_first_has_a_hook_before_it_are_exact(batch):
    model = build("opt").double()
    expected = gradients(model, hf_loss(model, *batch))
    calls: list[nn.Module] = []
    for layer in model.model.decoder.layers:
        layer.fc1.register_forward_pre_hook(lambda module, _: calls.append(module))
    apply_mst(model, **OPTIONS)
    assert furthest(gradients(model, hf_loss(model, *batch)), expected) < 1e-6
    assert calls
