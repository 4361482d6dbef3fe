"""``task=block``: one LM head or one MLP, standard and in mini-sequences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_mst.cli import main
from lightning_mst.configurations import conf_dir
from lightning_mst.experiments import block_cost
from lightning_mst.experiments.one_block import Block
from lightning_mst.models import from_config

TINY = ["model.shrink=64", "data.sequence_length=1024", "task.num_chunks=[2,8]", "task.repetitions=1"]


@pytest.fixture
def block(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``block("lm_head", *overrides)`` runs the experiment of that name once and gives back its result."""

    def run(name: str, *overrides: str) -> dict[str, Any]:
        main(["train", f"experiment=smoke/{name}", *TINY, f"hydra.run.dir='{tmp_path}'", *overrides])
        return json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))

    return run


@pytest.mark.parametrize("name", ["lm_head", "mlp", "timeline", "convergence", "long_context"])
def test_an_experiment_is_whole_in_both_sizes(name):
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        paper, smoke = (
            compose("config", overrides=["output_dir=here", f"experiment={size}/{name}"], return_hydra_config=True)
            for size in ("paper", "smoke")
        )

    assert (paper.trainer.accelerator, smoke.trainer.accelerator) == ("gpu", "cpu")
    assert (paper.trainer.precision, smoke.trainer.precision) == ("bf16-true", "32-true")
    for config in (paper, smoke):
        assert config.data.sequence_length > 1  # also where it follows from what is swept
        (swept,) = config.hydra.sweeper.params
        assert OmegaConf.select(config, swept) is not None


def peaks(result: dict[str, Any]) -> dict[int | None, float]:
    return {row["num_chunks"]: row["peak_gib"] for row in result["rows"]}


@pytest.mark.parametrize(
    ("name", "precision"), [("lm_head", "32-true"), ("lm_head", "bf16-mixed"), ("mlp", "bf16-true")]
)
def test_what_is_predicted_for_a_block_is_measured_and_falls_with_the_number_of_mini_sequences(block, name, precision):
    measured = block(name, f"precision={precision}")
    predicted = block(name, f"precision={precision}", "task.how=predicted")

    assert (measured["how"], predicted["how"]) == ("measured", "predicted")
    assert peaks(measured) == pytest.approx(peaks(predicted), rel=0.001)
    standard, *chunked = peaks(measured).values()
    assert sorted(chunked, reverse=True) == chunked
    assert chunked[-1] < 0.5 * standard
    assert all(row["seconds"] > 0 for row in measured["rows"])
    assert all(row["seconds"] is None for row in predicted["rows"])
    assert (measured["hidden_size"], measured["intermediate_size"], measured["vocab_size"]) == (64, 224, 2004)
    assert (measured["block"], measured["model"], measured["sequence_length"]) == (name, "llama3_8b", 1024)


def test_the_standard_head_holds_three_times_as_much_as_its_logits(block):
    tokens, hidden, vocab = 1024, 64, 2004
    # At the peak: the log-probabilities, their gradient, and that of the logits; and the head's input and weight.
    expected = 4 * (3 * tokens * vocab + tokens * hidden + vocab * hidden) / 2**30

    assert peaks(block("lm_head"))[None] == pytest.approx(expected, rel=0.01)


def test_the_loss_of_the_head_alone_is_that_of_the_whole_model_with_all_that_it_does_to_logits(monkeypatch):
    from transformers import Gemma2Config

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    model = from_config(Gemma2Config(**sizes, **heads, final_logit_softcapping=0.5), attn_implementation="eager")
    tokens = torch.randint(64, (1, 12))
    expected = model(input_ids=tokens, labels=tokens).loss.item()
    last = model.model(input_ids=tokens).last_hidden_state.detach().requires_grad_()
    losses = []
    monkeypatch.setattr(torch.Tensor, "backward", lambda self, *_: losses.append(self.item()))

    head = Block(model, "lm_head")
    for num_chunks in (None, 3):
        head.set_chunks(num_chunks)
        head.step(last, tokens)

    assert losses == pytest.approx([expected, expected], rel=1e-6)
    assert model(input_ids=tokens, labels=tokens).loss.item() == pytest.approx(expected, rel=1e-6)


def test_a_form_that_runs_out_of_memory_has_no_numbers_and_the_others_have(block, monkeypatch):
    step = Block.step

    def limited(self: Block, *tensors: torch.Tensor) -> None:
        if self._handle.config.lm_head_chunks is None and tensors[1].shape[1] > 2:
            raise torch.OutOfMemoryError("not enough")
        step(self, *tensors)

    monkeypatch.setattr(block_cost.Block, "step", limited)
    rows = block("lm_head")["rows"]

    assert rows[0] == {"num_chunks": None, "seconds": None, "peak_gib": None}
    assert rows[1]["seconds"] > 0
    assert rows[1]["peak_gib"] > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.block=attention", "task.block should be lm_head or mlp, got 'attention'"),
        ("task.num_chunks=[2,0]", r"task.num_chunks should be a list of whole numbers such as [2,4,8], got [2, 0]"),
        ("task.num_chunks=[2,2]", "task.num_chunks should hold each number once"),
        ("task.repetitions=0", "task.repetitions should be a whole number, 1 or more, got 0"),
        ("adapter=lora", "plain trained weights"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(block, capsys, override, message):
    with pytest.raises(SystemExit):
        block("lm_head", override)
    assert message in capsys.readouterr().err
