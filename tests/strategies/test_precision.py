"""Every precision of a Trainer on one device: the gradients that the optimizer gets, with and without our rewrite."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision, TransformerEnginePrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))

from cases import CHUNKS, Module, build, rows
from test_exactness import distance, overall

from lightning_mst import MSTCallback


class OneDevice(Module):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(rows(4, ragged=False), batch_size=2)


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def gradients(precision: str, *, mst: bool, tied: bool = False) -> list[dict[str, Tensor]]:
    """Those of two steps, as the optimizer sees them: unscaled."""
    module = OneDevice(build(tied))
    if precision == "16-mixed":
        # Lightning replaces it by bf16-mixed on a CPU, but not if it is given as a plugin.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        options: dict[str, Any] = {"plugins": [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]}
    else:
        options = {"precision": precision}
    runner = trainer(*([MSTCallback(**CHUNKS)] if mst else []), **options)
    runner.fit(module)
    assert runner.precision == precision
    assert runner.global_step == len(module.gradients) == 2
    return module.gradients


@pytest.fixture(scope="module")
def truth() -> dict[bool, list[dict[str, Tensor]]]:
    """The unmodified model's gradients in fp64."""
    return {tied: gradients("64-true", mst=False, tied=tied) for tied in (False, True)}


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
# transformers computes the loss and the norms in fp32, in a double-precision model as well.
@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-6), ("32-true", 1e-5)])
def test_gradients_are_those_of_the_unmodified_model(
    truth: dict[bool, list[dict[str, Tensor]]], precision: str, tolerance: float, tied: bool
) -> None:
    ours = gradients(precision, mst=True, tied=tied)
    assert distance(ours, truth[tied]) < tolerance
    assert {grad.dtype for step in ours for grad in step.values()} == {getattr(torch, f"float{precision[:2]}")}


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-true", "16-mixed"])
def test_half_precision_is_as_close_to_the_truth_as_the_unmodified_model(
    truth: dict[bool, list[dict[str, Tensor]]], precision: str, tied: bool
) -> None:
    ours, unmodified = (gradients(precision, mst=mst, tied=tied) for mst in (True, False))
    assert overall(ours, truth[tied]) <= 1.1 * overall(unmodified, truth[tied])
    for step, other in zip(ours, unmodified, strict=True):
        assert {name: grad.dtype for name, grad in step.items()} == {name: grad.dtype for name, grad in other.items()}


def test_a_step_that_overflows_in_fp16_is_skipped_as_without_mini_sequences() -> None:
    """The scaler finds infinities in the gradients of the two ops, too, and halves the scale."""
    weights, scales = [], []
    for mst in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
        module = OneDevice(build())
        before = [parameter.detach().clone() for parameter in module.parameters()]
        plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
        trainer(*([MSTCallback(**CHUNKS)] if mst else []), plugins=[plugin]).fit(module)
        weights.append(all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)))
        scales.append(scaler.get_scale())
    assert weights == [True, True]
    assert scales == [2.0**58, 2.0**58]


def test_transformer_engine_is_refused_with_what_to_use_instead() -> None:
    runner = trainer(MSTCallback(**CHUNKS))
    # Without its package, which needs a GPU: what counts is the class.
    runner.strategy.precision_plugin = TransformerEnginePrecision.__new__(TransformerEnginePrecision)
    with pytest.raises(MisconfigurationException, match=r"transformer-engine.*Use 'bf16-mixed' or 'bf16-true'"):
        runner.fit(OneDevice(build()))
