"""The LightningModule."""

from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.text import Perplexity
from transformers import LlamaConfig

from lightning_mst.causal_lm import CausalLM
from lightning_mst.models import from_config

VOCAB_SIZE = 40


def llama() -> nn.Module:
    return from_config(
        LlamaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    )


def batches(count: int = 3, batch_size: int = 2, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Batches in which a different number of labels is ignored."""
    made = []
    for index in range(count):
        ids = torch.randint(0, VOCAB_SIZE, (batch_size, length))
        labels = ids.clone()
        labels[:, : 3 * index] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def loader(data: list[dict[str, torch.Tensor]]) -> DataLoader:
    return DataLoader(data, batch_size=None)


def trainer(**options: object) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **options)


class Bigrams(nn.Module):
    """Not a transformer: a table of next-token logits; `form` is how it hands its loss over."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB_SIZE, VOCAB_SIZE)
        self.form = form

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> object:
        loss = F.cross_entropy(self.table(input_ids[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())
        return {
            "loss": loss,
            "tuple": (loss, "more"),
            "mapping": {"loss": loss},
            "object": SimpleNamespace(loss=loss),
            "nothing": None,
            "vector": loss.expand(3),
        }[self.form]


def test_validation_perplexity_is_that_of_torchmetrics_on_the_logits():
    torch.manual_seed(0)
    model, data = llama(), batches()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform, so that batches differ
    expected = Perplexity(ignore_index=-100)
    for batch in data:
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits
        expected.update(logits[:, :-1], batch["labels"][:, 1:])

    metrics = trainer().validate(CausalLM(model), loader(data), verbose=False)[0]

    assert metrics["val_perplexity"] == pytest.approx(float(expected.compute()), rel=1e-5)
    assert metrics["val_loss"] == pytest.approx(float(expected.compute().log()), rel=1e-5)


def test_a_batch_without_counted_tokens_does_not_spoil_the_perplexity():
    model, data = llama(), batches(count=1)
    empty = {"input_ids": data[0]["input_ids"], "labels": torch.full_like(data[0]["labels"], -100)}

    with_empty = trainer().validate(CausalLM(model), loader([empty, *data, empty]), verbose=False)[0]
    without = trainer().validate(CausalLM(model), loader(data), verbose=False)[0]

    assert with_empty == without


def test_training_logs_the_loss_of_each_step_and_lowers_it():
    torch.manual_seed(0)
    data = batches(count=1) * 20
    module = CausalLM(llama(), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01))
    fit = trainer(max_epochs=1)
    with torch.no_grad():
        first = float(module(**data[0]))

    fit.fit(module, loader(data))

    assert float(fit.callback_metrics["train_loss"]) < first - 0.5


def test_the_loss_is_the_models_own():
    model, batch = llama(), batches(count=1)[0]

    assert torch.equal(CausalLM(model)(**batch), model(**batch).loss)


@pytest.mark.parametrize("form", ["loss", "tuple", "mapping", "object"])
def test_a_model_that_is_no_transformer_may_hand_its_loss_over_in_any_usual_form(form):
    data = batches(count=2)
    fit = trainer(max_epochs=1)

    fit.fit(CausalLM(Bigrams(form)), loader(data), loader(data))

    assert fit.callback_metrics["val_perplexity"] > 1


@pytest.mark.parametrize(("form", "got"), [("nothing", "got NoneType"), ("vector", r"tensor of shape \(3,\)")])
def test_a_model_that_returns_no_loss_is_told_what_was_expected(form, got):
    with pytest.raises(TypeError, match=got):
        CausalLM(Bigrams(form))(**batches(count=1)[0])


def test_the_default_optimizer_is_adamw_on_what_can_be_trained():
    model = llama()
    model.model.embed_tokens.requires_grad_(False)

    optimizer = CausalLM(model).configure_optimizers()

    assert isinstance(optimizer, torch.optim.AdamW)
    trained = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    assert id(model.model.embed_tokens.weight) not in trained
    assert id(model.lm_head.weight) in trained


def test_a_scheduler_steps_with_the_optimizer():
    module = CausalLM(
        llama(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5),
    )

    trainer(max_steps=3).fit(module, loader(batches(count=3)))

    assert module.lr_schedulers().get_last_lr() == [0.125]
