"""MSTCallback with a real Trainer: what a user sees in fit, validate, test and predict."""

from __future__ import annotations

import logging
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import transformers
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_mst import MSTCallback
from lightning_mst.ops.deferred_logits import DeferredLogits
from lightning_mst.rewrite.verify import VerificationError

VOCAB = 101
CHUNKS = {"mlp_chunks": 3, "lm_head_chunks": 3}


class Program(pl.LightningModule):
    """A LightningModule as people write it: a transformers model and a loss in the training step."""

    def __init__(self, *, lazy: bool = False, dropout: float = 0.0, optimizer: type = torch.optim.SGD) -> None:
        super().__init__()
        self.dropout, self.optimizer = dropout, optimizer
        self.model: nn.Module | None = None
        self.seen: list[type] = []
        self.train_mean = MeanMetric()
        if not lazy:
            self.build()

    def build(self) -> None:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=VOCAB, attention_dropout=self.dropout,
        )  # fmt: skip
        self.model = transformers.AutoModelForCausalLM.from_config(config).train()

    def configure_model(self) -> None:
        if self.model is None:
            self.build()

    def loss(self, batch: Tensor) -> Tensor:
        logits = self.model(input_ids=batch, use_cache=False).logits
        self.seen.append(type(logits))
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), batch[:, 1:].reshape(-1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.train_mean.update(loss.detach())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.model(input_ids=batch, use_cache=False).logits
        self.seen.append(type(logits))
        return logits.argmax(-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), lr=0.1)


def data(tokens: int = 50) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(torch.randint(0, VOCAB, (8, tokens), generator=generator), batch_size=2)


def trainer(tmp_path, *callbacks, **options) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path,
        "log_every_n_steps": 1,
    }  # fmt: skip
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def traces(program: pl.LightningModule) -> list[str]:
    names = ("_mst", "_mst_configure_model", "configure_model", "log", "log_dict")
    found = [f"{n}.{k}" for n, m in program.named_modules() for k in names if k in m.__dict__]
    return found + [n for n, m in program.named_modules() if n and "forward" in m.__dict__]


@pytest.mark.parametrize("lazy", [False, True])
def test_one_line_trains_the_same_weights_in_mini_sequences(tmp_path, lazy):
    programs = []
    for callbacks in ([], [MSTCallback(**CHUNKS)]):
        program = Program(lazy=lazy)
        trainer(tmp_path, *callbacks).fit(program, data())
        programs.append(program)
    plain, ours = programs
    assert set(plain.seen) == {torch.Tensor}
    assert set(ours.seen) == {DeferredLogits}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=1e-4, atol=1e-6)


def test_it_works_in_fit_validate_test_and_predict_and_restores_after_each(tmp_path):
    program, callback = Program(), MSTCallback(**CHUNKS)
    runner = trainer(tmp_path, callback)
    for run in (
        lambda: runner.fit(program, data(), data()),
        lambda: runner.validate(program, data(), verbose=False),
        lambda: runner.test(program, data(), verbose=False),
        lambda: runner.predict(program, data()),
    ):
        program.seen.clear()
        result = run()
        assert set(program.seen) == {DeferredLogits}
        assert traces(program) == []
        assert callback.handle is None
    plain = Program()
    plain.load_state_dict(program.state_dict())
    expected = trainer(tmp_path).predict(plain, data())
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_an_exception_in_training_leaves_the_model_as_it_was(tmp_path):
    class Failing(Program):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            super().training_step(batch, batch_idx)
            raise ZeroDivisionError

    program = Failing()
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, MSTCallback(**CHUNKS)).fit(program, data())
    assert program.seen == [DeferredLogits]
    assert traces(program) == []


def test_a_failed_configure_model_leaves_no_trace(tmp_path):
    class Failing(Program):
        def configure_model(self) -> None:
            raise ZeroDivisionError

    program = Failing()
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, MSTCallback(**CHUNKS)).fit(program, data())
    assert traces(program) == []


def test_checkpoints_hold_the_same_keys_with_and_without_and_load_both_ways(tmp_path):
    program = Program()
    runner = trainer(tmp_path, MSTCallback(**CHUNKS))
    runner.fit(program, data())
    runner.save_checkpoint(tmp_path / "ours.ckpt")
    saved = torch.load(tmp_path / "ours.ckpt", weights_only=False)
    assert list(saved["state_dict"]) == list(Program().state_dict())
    resumed = Program()
    trainer(tmp_path, max_epochs=2).fit(resumed, data(), ckpt_path=tmp_path / "ours.ckpt")
    straight = Program()
    trainer(tmp_path, max_epochs=2).fit(straight, data())
    for name, parameter in straight.named_parameters():
        torch.testing.assert_close(resumed.get_parameter(name), parameter, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_works_in_every_precision_and_with_gradient_accumulation(tmp_path, precision, accumulate):
    losses = []
    for callbacks in ([], [MSTCallback(**CHUNKS)]):
        runner = trainer(tmp_path, *callbacks, precision=precision, accumulate_grad_batches=accumulate)
        runner.fit(Program(), data())
        losses.append(runner.callback_metrics["train_loss"].item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-2 if "16" in precision else 1e-5)


def test_ddp_on_one_process_with_unused_parameters_finds_the_head(tmp_path):
    """Plain DDP walks from the outputs to the parameters; the deferred logits must lead there."""
    heads = []
    for callbacks in ([], [MSTCallback(**CHUNKS)]):
        program = Program()
        program.unused = nn.Linear(2, 2)
        start = program.model.lm_head.weight.detach().clone()
        trainer(tmp_path, *callbacks, strategy="ddp_find_unused_parameters_true").fit(program, data())
        heads.append(program.model.lm_head.weight.detach())
        assert not torch.equal(heads[-1], start)
    torch.testing.assert_close(*heads, rtol=1e-4, atol=1e-6)


def test_peak_memory_is_logged_in_gib_at_every_step(tmp_path):
    runner = trainer(tmp_path, MSTCallback(**CHUNKS), logger=CSVLogger(tmp_path))
    runner.fit(Program(), data())
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("peak_memory_gib")
    values = [float(line.split(",")[column]) for line in lines[1:]]
    assert len(values) == 4
    assert all(0.05 < v < 20 for v in values)
    assert "peak_memory_gib" in runner.progress_bar_metrics


def test_peak_memory_sees_what_a_step_allocates_and_forgets_it_in_the_next(tmp_path):
    class Wasteful(Program):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == 1:
                torch.ones(2**28)  # 1 GiB
            return super().training_step(batch, batch_idx)

    runner = trainer(tmp_path, MSTCallback(**CHUNKS), logger=CSVLogger(tmp_path))
    runner.fit(Wasteful(), data())
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("peak_memory_gib")
    first, second, third, _ = (float(line.split(",")[column]) for line in lines[1:])
    assert second - first == pytest.approx(1.0, abs=0.1)
    assert third - first == pytest.approx(0.0, abs=0.1)


def test_memory_logging_can_be_switched_off(tmp_path):
    runner = trainer(tmp_path, MSTCallback(**CHUNKS, log_memory=False))
    runner.fit(Program(), data())
    assert "peak_memory_gib" not in runner.callback_metrics


def test_the_table_is_printed_once(tmp_path, capsys):
    runner = trainer(tmp_path, MSTCallback(**CHUNKS))
    program = Program()
    runner.fit(program, data())
    runner.validate(program, data(), verbose=False)
    output = capsys.readouterr().out
    assert output.count("Mini-sequence form of Program") == 1
    assert "LlamaMLP" in output


def test_with_everything_off_it_only_logs_memory(tmp_path, capsys):
    callback = MSTCallback(mlp_chunks=None, lm_head_chunks=None, checkpoint_layers="none")
    program = Program()
    runner = trainer(tmp_path, callback)
    runner.fit(program, data())
    assert set(program.seen) == {torch.Tensor}
    assert "peak_memory_gib" in runner.callback_metrics
    assert "Mini-sequence form" not in capsys.readouterr().out


def test_a_model_left_in_eval_mode_is_warned_about(tmp_path):
    program = Program()
    program.model.eval()  # as from_pretrained leaves it
    with pytest.warns(UserWarning, match=r"evaluation mode.*activation checkpointing.*model\.train\(\)"):
        trainer(tmp_path, MSTCallback(**CHUNKS)).fit(program, data())


def test_a_model_in_training_mode_is_not(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, MSTCallback(**CHUNKS)).fit(Program(), data())
    assert not any("evaluation mode" in str(w.message) for w in caught)


@pytest.mark.parametrize("options", [{"mlp_chunks": 0}, {"lm_head_chunks": "none"}, {"checkpoint_layers": -1}])
def test_wrong_settings_are_refused_when_the_callback_is_made(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MSTCallback(**options)


def test_a_program_without_anything_to_rewrite_stops_before_training(tmp_path):
    class Tiny(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise AssertionError("a step was spent")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    program = Tiny()
    with pytest.raises(ValueError, match="Nothing to rewrite in Tiny"):
        trainer(tmp_path, MSTCallback()).fit(program, data())
    assert traces(program) == []


# --- verify --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_verify_passes_on_a_right_model_and_leaves_no_side_effects(tmp_path, caplog, dropout):
    weights = []
    for verify in (False, True):
        torch.manual_seed(3)
        program = Program(dropout=dropout)
        runner = trainer(tmp_path, MSTCallback(**CHUNKS, verify=verify))
        with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
            torch.manual_seed(4)
            runner.fit(program, data())
        assert program.train_mean.update_count == 4
        assert traces(program) == []
        weights.append([p.detach().clone() for p in program.parameters()])
    # The same masks, the same steps: the check drew no random numbers and stepped no optimizer.
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    (message,) = [r.message for r in caplog.records if "verified the first batch" in r.message]
    assert ("evaluation mode" in message) == bool(dropout)


def test_verify_stops_a_program_whose_gradients_are_wrong_before_its_first_step(tmp_path, monkeypatch):
    """A head whose weight gradient is twice too large, as in the paper's own code."""
    from lightning_mst.ops.linear_cross_entropy import _LossWithGrads

    right = _LossWithGrads.backward

    def wrong(ctx, *grads):
        result = list(right(ctx, *grads))
        result[4] = result[4] * 2
        return tuple(result)

    monkeypatch.setattr(_LossWithGrads, "backward", staticmethod(wrong))
    program = Program()
    before = [p.detach().clone() for p in program.parameters()]
    with pytest.raises(VerificationError, match=r"gradient of model\.lm_head\.weight differs .* by 1 of its norm"):
        trainer(tmp_path, MSTCallback(**CHUNKS, verify=True)).fit(program, data())
    assert all(torch.equal(a, b) for a, b in zip(before, program.parameters(), strict=True))
    assert traces(program) == []


def test_verify_stops_a_program_whose_loss_is_wrong(tmp_path, monkeypatch):
    from lightning_mst.ops import evaluation

    right = evaluation.head_cross_entropy
    monkeypatch.setattr(evaluation, "head_cross_entropy", lambda *args, **kw: right(*args, **kw) * 0.99)
    with pytest.raises(VerificationError, match="first batch's loss is"):
        trainer(tmp_path, MSTCallback(**CHUNKS, verify=True)).fit(Program(), data())


def test_verify_refuses_manual_optimization(tmp_path):
    program = Program()
    program.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        trainer(tmp_path, MSTCallback(**CHUNKS, verify=True)).fit(program, data())
