"""The user's own training step, rehearsed: what is predicted is what is measured."""

from __future__ import annotations

import logging
import re
import warnings

import lightning.pytorch as pl
import pytest
import torch
from test_callback import CHUNKS, Program, data, trainer
from torch import Tensor

from lightning_mst import MSTCallback, OptimizerInBackward
from lightning_mst.training.predicted import CannotRehearse, RehearsedProgram


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr)


def adamw_in_backward(parameters, lr):
    return OptimizerInBackward(parameters, torch.optim.AdamW, lr=lr)


def fit(tmp_path, program: pl.LightningModule, caplog, ckpt_path=None, **options) -> tuple[MSTCallback, list[str]]:
    """Trains with exact bytes of tensors; returns the callback and what it said about its prediction."""
    callback = MSTCallback(**CHUNKS, log_memory="tensors")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, callback, **options).fit(program, data(300), ckpt_path=ckpt_path)
    said = [record.message for record in caplog.records] + [str(warning.message) for warning in caught]
    return callback, [text for text in said if "predict" in text]


def apart(message: str) -> float:
    return float(re.search(r"([\d.]+)% apart", message)[1])


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_first_passes_take_what_is_predicted_and_so_do_later_steps(tmp_path, caplog, precision, accumulate):
    options = {"precision": precision, "accumulate_grad_batches": accumulate}
    callback, (message,) = fit(tmp_path, Program(optimizer=adamw), caplog, **options)
    assert message.startswith("Peak memory of the first forward and backward pass: predicted ")
    assert apart(message) < 1
    assert "predicted" in message.partition("From the second step on")[2]
    # The last step of the run is a later one, whole.
    assert callback.memory.last.peak == pytest.approx(callback.memory.predicted.tensors, rel=0.01)


def test_a_step_of_an_optimizer_in_the_backward_pass_is_compared_once_it_has_states(tmp_path, caplog):
    callback, (message,) = fit(tmp_path, Program(optimizer=adamw_in_backward), caplog)
    assert message.startswith("Peak memory of a training step: predicted ")
    assert apart(message) < 1
    assert callback.memory.last.peak == pytest.approx(callback.memory.predicted.tensors, rel=0.01)


def test_a_resumed_run_is_compared_in_its_second_step(tmp_path, caplog):
    program = Program(optimizer=adamw)
    first = trainer(tmp_path, MSTCallback(**CHUNKS), max_steps=2)
    first.fit(program, data(300))
    first.save_checkpoint(tmp_path / "two.ckpt")
    _, (message,) = fit(tmp_path, Program(optimizer=adamw), caplog, ckpt_path=tmp_path / "two.ckpt", max_epochs=2)
    assert message.startswith("Peak memory of a training step")
    assert apart(message) < 1


def test_a_rehearsal_leaves_no_trace_in_the_program(tmp_path, caplog):
    """The same losses, weights, metric and random numbers as without."""
    results = []
    for log_memory in (False, "tensors"):
        torch.manual_seed(1)
        program = Program(dropout=0.2, optimizer=adamw)
        runner = trainer(tmp_path, MSTCallback(**CHUNKS, log_memory=log_memory))
        torch.manual_seed(2)
        runner.fit(program, data())
        assert program.train_mean.update_count == 4
        results.append([runner.callback_metrics["train_loss"], *(p.detach() for p in program.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_was_not_foreseen_is_warned_about_with_both_places(tmp_path, caplog):
    class Hoarding(Program):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            # 4 MiB, which the rehearsal does not see.
            more = torch.zeros(2**20) if type(batch) is Tensor else None
            loss = super().training_step(batch, batch_idx)
            return loss + 0 * more.sum() if more is not None else loss

    _, (message,) = fit(tmp_path, Hoarding(optimizer=adamw), caplog)
    assert "That is more than 10%" in message
    assert apart(message) > 10
    assert "(backward of layer" in message
    assert "backward of model.model.layers." in message or "forward of" in message


def test_a_training_step_that_reads_values_gets_the_reason_and_trains(tmp_path, caplog):
    class Reading(Program):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss if loss.detach().float().numpy() > 0 else loss * 2

    callback, (message,) = fit(tmp_path, Reading(optimizer=adamw), caplog)
    assert message.startswith("No prediction of the peak memory beside the measured one: the training step can't run")
    assert "numpy" in message
    assert callback.memory.predicted is None
    assert callback.memory.last.peak > 0


def test_programs_that_cannot_be_rehearsed_say_why(tmp_path):
    reasons = {}

    class Asking(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            for name, change in {
                "manual": lambda: setattr(pl_module, "automatic_optimization", False),
                "quantized": lambda: setattr(
                    pl_module, "odd", torch.nn.Parameter(torch.ones(2, dtype=torch.int8), False)
                ),
            }.items():
                change()
                with pytest.raises(CannotRehearse) as error:
                    RehearsedProgram(trainer, pl_module, batch, batch_idx)
                reasons[name] = str(error.value)
                pl_module.automatic_optimization = True
            trainer.should_stop = True

    trainer(tmp_path, Asking(), max_steps=1).fit(Program(), data())
    assert "manual optimization" in reasons["manual"]
    assert reasons["quantized"] == "odd is quantized (Parameter of torch.int8)"


def test_a_program_that_can_not_be_copied_trains_without_a_prediction(tmp_path, caplog):
    class Odd(Program):
        def __deepcopy__(self, memo: dict) -> Program:
            raise KeyError

    callback, (message,) = fit(tmp_path, Odd(optimizer=adamw), caplog)
    assert message.endswith("one: the LightningModule can't be copied (KeyError: no message).")
    assert callback.memory.last.peak > 0
