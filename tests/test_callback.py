"""MSTCallback with a real Trainer: what a user sees in fit, validate, test and predict."""

from __future__ import annotations

import json
import logging
import warnings
from importlib.util import find_spec

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import transformers
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.optim import optimizer as optimizers
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_mst import MSTCallback
from lightning_mst.memory import PeakMemory, TensorBytes
from lightning_mst.memory import peak as peak_module
from lightning_mst.ops.deferred_logits import DeferredLogits
from lightning_mst.rewrite.verify import VerificationError
from lightning_mst.training import predicted_check, step_memory, timeline
from lightning_mst.units import parse_bytes

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


# --- where in a step the peak is -----------------------------------------------------------------------------------


def global_hooks() -> int:
    """How many hooks there are on all modules and optimizers of the process."""
    tables = (
        modules._global_forward_hooks, modules._global_forward_pre_hooks, optimizers._global_optimizer_pre_hooks,
        optimizers._global_optimizer_post_hooks,
    )  # fmt: skip
    return sum(len(table) for table in tables)


def test_every_step_logs_the_peak_of_each_phase_and_records_where_the_highest_was(tmp_path):
    callback = MSTCallback(**CHUNKS)
    runner = trainer(tmp_path, callback, logger=CSVLogger(tmp_path))
    runner.fit(Program(), data())
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    for line in lines[1:]:
        values = dict(zip(columns, line.split(","), strict=True))
        phases = [float(values[f"peak_memory_{phase}_gib"]) for phase in ("forward", "backward", "optimizer")]
        assert float(values["peak_memory_gib"]) == max(phases)
    step = callback.memory.last
    assert step.step == 3
    assert step.peak == max(step.places.values()) == step.places[step.place]
    layers = {place.layer for place in step.places if place.phase == "backward"}
    assert {"model.model.layers.0", "model.model.layers.1"} <= layers
    assert callback.memory.highest.peak >= step.peak
    assert (step.allocated, step.reserved, step.kinds) == (None, None, None)
    assert not {"allocated_memory_gib", "reserved_memory_gib"} & runner.callback_metrics.keys()


class AtWork(pl.Callback):
    """Notes how many hooks there are during and between steps."""

    def __init__(self) -> None:
        self.within: list[int] = []
        self.between: list[int] = []

    def on_before_backward(self, *_) -> None:
        self.within.append(global_hooks())

    def on_validation_batch_start(self, *_) -> None:
        self.between.append(global_hooks())

    def on_train_batch_end(self, *_) -> None:
        self.between.append(global_hooks())  # put behind MSTCallback


@pytest.mark.parametrize("log_memory", [True, "tensors"])
def test_hooks_are_there_in_the_steps_alone(tmp_path, log_memory):
    at_work = AtWork()
    before = global_hooks()
    trainer(tmp_path, MSTCallback(**CHUNKS, log_memory=log_memory), at_work).fit(Program(), data(), data())
    assert at_work.within == [before + 4] * 4
    assert set(at_work.between) == {before}
    assert global_hooks() == before
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_no_hook_outlives_an_exception_in_mid_step(tmp_path, where):
    class Failing(Program):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 1 and where == "forward":
                raise ZeroDivisionError
            return loss

        def backward(self, loss: Tensor) -> None:
            super().backward(loss)
            if self.trainer.global_step == 1 and where == "backward":
                raise ZeroDivisionError

        def configure_gradient_clipping(self, *_, **__) -> None:
            if self.trainer.global_step == 1 and where == "optimizer":
                raise ZeroDivisionError

    before, program = global_hooks(), Failing()
    runner = trainer(tmp_path, MSTCallback(**CHUNKS, log_memory="tensors"))
    with pytest.raises(ZeroDivisionError):
        runner.fit(program, data())
    assert global_hooks() == before
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0
    assert all(not p._post_accumulate_grad_hooks for p in program.parameters())
    assert "training_step" not in runner.strategy.__dict__


def test_a_repeated_step_is_forward_again_and_leaves_no_hook(tmp_path):
    seen = []

    class Scarce(Program):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            seen.append(callback._monitor.meter.places.phase)
            return super().training_step(batch, batch_idx)

        def backward(self, loss: Tensor) -> None:
            super().backward(loss)
            if len(seen) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    callback = MSTCallback(**CHUNKS, on_oom="retry")
    before, runner = global_hooks(), trainer(tmp_path, callback)
    runner.fit(Scarce(), data())
    assert seen == ["forward"] * 5
    assert global_hooks() == before
    assert not {"training_step", "backward"} & runner.strategy.__dict__.keys()


def test_manual_optimization_has_its_phases_too(tmp_path):
    seen = []

    class Manual(Program):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            for _ in range(2):
                seen.append(callback._monitor.meter.places.phase)
                self.manual_backward(self.loss(batch))
                self.optimizers().step()
                self.optimizers().zero_grad()

    callback = MSTCallback(**CHUNKS, log_memory="tensors")
    before = global_hooks()
    trainer(tmp_path, callback).fit(Manual(), data())
    assert seen == ["forward"] * 8
    assert callback.memory.last.phases.keys() >= {"forward", "backward"}
    assert global_hooks() == before


def test_an_accelerator_logs_allocated_and_reserved_memory(tmp_path, monkeypatch):
    class Module:
        """An allocator that has given out what a ``TensorBytes`` counts."""

        def memory_stats_as_nested_dict(self, device: torch.device) -> dict:
            return {"allocated_bytes": {"all": {"peak": held.peak}}, "reserved_bytes": {"all": {"peak": 2 * held.peak}}}

        def max_memory_allocated(self, device: torch.device) -> int:
            return held.peak

        def reset_peak_memory_stats(self, device: torch.device) -> None:
            held.peak = held.live

    monkeypatch.setattr(peak_module, "_module", lambda device: Module())
    # Its fake tensors would be counted as if they took memory.
    monkeypatch.setattr(predicted_check.PredictionCheck, "end", lambda *_: None)
    monkeypatch.setattr(step_memory, "PeakMemory", lambda device: PeakMemory(torch.device("cuda", 0)))
    peaks = {}
    for log_memory in (True, "tensors"):
        program, callback = Program(), MSTCallback(**CHUNKS, log_memory=log_memory)
        runner = trainer(tmp_path, callback)
        with TensorBytes() as held:
            held.count((*program.parameters(), *program.buffers()), "weights")
            runner.fit(program, data(300))
        metrics = runner.callback_metrics
        peaks[log_memory] = callback.memory.last
        assert metrics["reserved_memory_gib"] == pytest.approx(2 * metrics["allocated_memory_gib"])
        if log_memory is True:
            assert metrics["allocated_memory_gib"] == metrics["peak_memory_gib"]
    assert peaks[True].place == peaks["tensors"].place
    assert peaks[True].peak == pytest.approx(peaks["tensors"].peak, rel=0.02)
    assert sum(peaks["tensors"].kinds.values()) == peaks["tensors"].peak


def test_of_a_compiled_model_the_passes_are_told_apart_but_tensors_are_not_followed(tmp_path):
    def program() -> Program:
        model = Program()
        model.model.model.norm.compile(backend="eager")
        return model

    callback, before = MSTCallback(**CHUNKS), global_hooks()
    trainer(tmp_path, callback, max_steps=1).fit(program(), data())
    assert (
        str(callback.memory.last.place).endswith(" of a compiled model")
        or callback.memory.last.place.phase == "optimizer"
    )
    assert callback.memory.last.phases.keys() == {"forward", "backward", "optimizer"}
    can_draw = find_spec("matplotlib") is not None
    for options in ({"log_memory": "tensors"}, *([{"memory_timeline": True}] if can_draw else [])):
        with pytest.raises(MisconfigurationException, match=r"leave out torch\.compile"):
            trainer(tmp_path, MSTCallback(**CHUNKS, **options)).fit(program(), data())
    assert global_hooks() == before


@pytest.mark.parametrize(("device_memory", "layers"), [("3MiB", 1), ("1GiB", 0)])
def test_as_few_layers_are_checkpointed_as_the_first_batch_requires(tmp_path, device_memory, layers):
    counts = []

    class Counting(pl.Callback):
        def on_train_batch_end(self, *_) -> None:
            counts.append(sum(row.form == "checkpointed" for row in callback.handle.rows))

    callback = MSTCallback(**CHUNKS, checkpoint_layers="auto", device_memory=device_memory, log_memory="tensors")
    trainer(tmp_path, callback, Counting(), max_steps=3).fit(Program(optimizer=torch.optim.AdamW), data(400))
    assert counts == [layers] * 3
    assert callback.memory.highest.peak < parse_bytes(device_memory)


def test_a_timeline_is_drawn_once_of_the_second_step(tmp_path):
    pytest.importorskip("matplotlib")
    callback = MSTCallback(**CHUNKS, log_memory=False, memory_timeline=True)
    runner = trainer(tmp_path, callback)
    runner.fit(Program(optimizer=torch.optim.AdamW), data(200))
    drawn = json.loads((tmp_path / "memory_timeline.json").read_text())
    standard, ours = drawn["timelines"]
    assert (standard["form"], standard["source"]) == ("standard", "modelled")
    assert (ours["form"], ours["source"]) == ("mini-sequences", "measured")
    assert standard["peak_bytes"] > ours["peak_bytes"]
    assert standard["persistent_bytes"] == ours["persistent_bytes"], "both with the optimizer's states"
    assert drawn["title"] == "Memory of one training step of Program, 2 x 200 tokens"
    assert "first step" not in drawn["note"]
    assert (tmp_path / "memory_timeline.png").stat().st_size > 20_000
    assert "peak_memory_gib" not in runner.callback_metrics


def test_a_run_of_one_step_has_a_timeline_that_says_so(tmp_path):
    pytest.importorskip("matplotlib")
    off = {"mlp_chunks": None, "lm_head_chunks": None, "checkpoint_layers": "none"}
    trainer(tmp_path, MSTCallback(**off, memory_timeline=True), max_steps=1).fit(Program(), data())
    drawn = json.loads((tmp_path / "memory_timeline.json").read_text())
    (standard,) = drawn["timelines"]
    assert (standard["form"], standard["source"]) == ("standard", "measured")
    assert "first step" in drawn["note"]


def test_a_timeline_without_matplotlib_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(timeline, "find_spec", lambda name: None)
    program = Program()
    with pytest.raises(MisconfigurationException, match=r"pip install 'lightning-mst\[plots\]'"):
        trainer(tmp_path, MSTCallback(**CHUNKS, memory_timeline=True)).fit(program, data())
    assert program.seen == []


def test_a_wrong_way_to_log_memory_is_refused():
    with pytest.raises(ValueError, match="log_memory='bytes' is not a choice"):
        MSTCallback(log_memory="bytes")
