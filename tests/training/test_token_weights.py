"""Losses by tokens: an accumulated step against one big batch, by the module, the callback, or both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mst import MSTCallback
from lightning_mst.causal_lm import CausalLM
from lightning_mst.training.token_weights import TokenWeights

VOCAB, LENGTH = 61, 17


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    """In fp64 throughout, unlike transformers' models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x)[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


def build() -> Model:
    torch.manual_seed(0)
    return Model().double()


def rows(count: int) -> list[dict[str, Tensor]]:
    """The first labels of every row are ignored: of each another number, of the third all."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for index in range(count):
        ids = torch.randint(VOCAB, (LENGTH,), generator=generator)
        labels = ids.clone()
        labels[: (0, 9, LENGTH, 4, 15)[index % 5]] = -100
        result.append({"input_ids": ids, "labels": labels})
    return result


class Noted(CausalLM):
    def __init__(self, **options: Any) -> None:
        super().__init__(build(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5), **options)
        self.gradients: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in self.model.named_parameters()})


def fit(module: CausalLM, *callbacks: Any, count: int = 10, **options: Any) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(rows(count), batch_size=1))


def check_against_big_batches(gradients: list[dict[str, Tensor]], sizes: list[int]) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    data = iter(rows(sum(sizes)))
    assert len(gradients) == len(sizes)
    for got, size in zip(gradients, sizes, strict=True):
        batch = [next(data) for _ in range(size)]
        ids, labels = (torch.stack([row[key] for row in batch]) for key in ("input_ids", "labels"))
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).backward()
        for name, parameter in model.named_parameters():
            assert (got[name] - parameter.grad).norm() <= 1e-10 * parameter.grad.norm(), name
        optimizer.step()


@pytest.mark.parametrize("by", ["module", "callback", "both", "count"])
def test_an_accumulated_step_is_that_of_one_big_batch(by: str) -> None:
    module = Noted(token_weighted=by in ("module", "both"))
    weighted: Any = {"module": False, "callback": True, "both": True}.get(by)
    if by == "count":
        weighted = lambda batch: int((batch["labels"][:, 1:] >= 0).sum())  # noqa: E731
    callback = MSTCallback(mlp_chunks=3, lm_head_chunks=3, token_weighted=weighted)
    # The last step of the epoch has only two micro-batches.
    fit(module, callback, accumulate_grad_batches=4)
    check_against_big_batches(module.gradients, [4, 4, 2])


def test_without_it_an_accumulated_step_is_another() -> None:
    module = Noted()
    fit(module, MSTCallback(mlp_chunks=3, lm_head_chunks=3), accumulate_grad_batches=2, count=2)
    with pytest.raises(AssertionError):
        check_against_big_batches(module.gradients, [2])


def test_it_does_not_need_mini_sequences_and_follows_a_schedule_of_accumulation() -> None:
    module = Noted(token_weighted=True)
    fit(module, GradientAccumulationScheduler({0: 5}))
    check_against_big_batches(module.gradients, [5, 5])


def test_losses_are_returned_and_logged_as_they_are() -> None:
    weighted, plain = Noted(token_weighted=True), Noted()
    fit(weighted, count=3)
    fit(plain, count=3)
    assert weighted.losses == pytest.approx(plain.losses, nan_ok=True)
    # With one batch to a step there is nothing to weight.
    for got, wanted in zip(weighted.gradients, plain.gradients, strict=True):
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_the_strategy_is_left_as_it_was() -> None:
    module = Noted(token_weighted=True)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[MSTCallback(mlp_chunks=3, lm_head_chunks=3, on_oom="retry")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(rows(2), batch_size=1))
    assert not {"setup", "training_step", "backward"} & trainer.strategy.__dict__.keys()


def test_a_batch_without_labels_says_what_to_do() -> None:
    with pytest.raises(MisconfigurationException, match=r"counts the tokens in batch\['labels'\].*keys input_ids"):
        TokenWeights()._count({"input_ids": torch.zeros(1, 3)})
    with pytest.raises(MisconfigurationException, match="the batch has Tensor"):
        TokenWeights()._count(torch.zeros(1, 3))


def test_manual_optimization_is_refused() -> None:
    module = Noted(token_weighted=True)
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="token_weighted=True needs automatic optimization"):
        fit(module)
