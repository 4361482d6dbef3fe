"""One training run from the command line."""

from __future__ import annotations

import csv
import importlib.util
import json
import math

import pytest

from lightning_mst.cli import main
from lightning_mst.models import from_config, from_pretrained
from lightning_mst.program.results import write_result
from lightning_mst.program.train import missing_keys


def test_a_run_writes_its_result_and_shows_a_summary(train, tmp_path, capsys):
    result = train("mst=auto", "scheduler=cosine")

    assert result["status"] == "completed"
    assert result["steps"] == len(result["losses"]) == 2
    assert result["loss"] == result["losses"][-1]
    assert result["val_perplexity"] == pytest.approx(math.exp(result["val_loss"]), rel=1e-5)
    assert result["tokens_per_second"] > 0
    assert result["peak_memory_gib"] > 0
    assert (result["sequence_length"], result["batch_size"]) == (64, 1)
    assert (result["model"], result["mst_name"], result["precision"]) == ("llama_small", "auto", "32-true")
    assert result["mst"]["mlp_chunks"] == "auto"
    assert (result["strategy"], result["devices"]) == ("auto", 1)
    assert result["parameters"] > 10_000
    text = capsys.readouterr().out
    for shown in ("validation perplexity", "tokens per second", "peak memory (GiB)", str(tmp_path / "run")):
        assert shown in text


def test_every_mst_setting_trains_the_same_function(train, tmp_path):
    off = train("mst=off", folder=tmp_path / "off")
    for name in ("auto", "paper", "recompute", "no_recompute", "lm_head_only"):
        result = train(f"mst={name}", folder=tmp_path / name)
        assert result["losses"] == pytest.approx(off["losses"], rel=1e-5)
        assert result["val_perplexity"] == pytest.approx(off["val_perplexity"], rel=1e-4)
    chunked = train("mst.mlp_chunks=3", "mst.lm_head_chunks=5", folder=tmp_path / "chunked")
    assert chunked["losses"] == pytest.approx(off["losses"], rel=1e-5)


def test_the_vocabulary_of_the_small_model_is_the_tokenizers(train, tmp_path):
    small = train("data.vocab_size=280", folder=tmp_path / "small")
    large = train("data.vocab_size=300", folder=tmp_path / "large")

    assert small["parameters"] < large["parameters"]


def test_without_validation_there_is_no_perplexity(train):
    result = train("validate=false")

    assert result["val_perplexity"] is None
    assert result["loss"] > 0


def test_validation_of_no_batches_leaves_the_perplexity_open(train):
    assert train("trainer.limit_val_batches=0")["val_perplexity"] is None


def test_a_failed_run_leaves_its_error_in_place_of_an_older_result(train, tmp_path):
    train()
    with pytest.raises(SystemExit):
        train("model.config.hidden_size=33")

    failure = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert failure.keys() == {"status", "error", "rank"}
    assert (failure["status"], failure["rank"]) == ("failed", 0)
    assert failure["error"].startswith("ConfigurationError: model: ")
    assert "The hidden size (33)" in failure["error"]


def test_without_callbacks_nothing_is_measured_and_nothing_is_invented(train):
    result = train("callbacks=none")

    assert (result["tokens_per_second"], result["peak_memory_gib"]) == (None, None)
    assert result["steps"] == 2


def test_accumulated_batches_count_as_one_step(train):
    result = train("trainer.accumulate_grad_batches=3")

    assert result["steps"] == len(result["losses"]) == 2


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_weights_of_every_precision_train(train, precision):
    result = train(f"precision={precision}")

    assert result["precision"] == precision
    assert 0 < result["loss"] < 10


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_goes_with_a_fused_optimizer_and_clipped_gradients(train, precision):
    """Lightning refuses to clip where the optimizer offers to unscale gradients itself."""
    assert 0 < train(f"precision={precision}", "optimizer.fused=true", "trainer.gradient_clip_val=1.0")["loss"] < 10


def test_metrics_of_every_step_go_to_the_csv_logger(train, tmp_path):
    train("logger=csv")

    with next((tmp_path / "run").rglob("metrics.csv")).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sum(bool(row["train_loss"]) for row in rows) == 2
    assert {"peak_memory_gib", "tokens_per_second", "val_perplexity"} <= set(rows[0])


def test_metrics_go_to_tensorboard(train, tmp_path):
    pytest.importorskip("tensorboard")
    train("logger=tensorboard")

    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.tfevents.*"))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_logger_that_is_not_installed_is_named(run_badly):
    assert "wandb" in run_badly("logger=wandb")


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(train, tmp_path):
    settings = ["callbacks=checkpoint", "callbacks.checkpoint.every_n_train_steps=2", "scheduler=constant"]
    whole = train(*settings, "callbacks.checkpoint.save_top_k=-1", "trainer.max_steps=5")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "last.ckpt",
        "step_2.ckpt",
        "step_4.ckpt",
        "step_5.ckpt",
    ]
    assert (checkpoints / "last.ckpt").resolve() == checkpoints / "step_5.ckpt"

    folder = tmp_path / "resumed"
    resumed = train(*settings, "trainer.max_steps=5", f"ckpt_path={checkpoints}/step_2.ckpt", folder=folder)

    assert resumed["losses"] == whole["losses"][2:]
    assert (resumed["steps"], resumed["val_perplexity"]) == (5, whole["val_perplexity"])
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["last.ckpt", "step_5.ckpt"]


def test_a_run_of_epochs_ends_with_a_checkpoint_from_which_a_longer_one_goes_on(train, tmp_path):
    settings = ["callbacks=checkpoint", "trainer.max_steps=-1", "+trainer.limit_train_batches=2"]
    whole = train(*settings, "trainer.max_epochs=3")
    train(*settings, "trainer.max_epochs=2", folder=tmp_path / "short")
    last = tmp_path / "short" / "checkpoints" / "last.ckpt"
    resumed = train(*settings, "trainer.max_epochs=3", f"ckpt_path={last}", folder=tmp_path / "long")

    assert last.resolve().name == "step_4.ckpt"
    assert len(whole["losses"]) == 6
    assert resumed["losses"] == whole["losses"][4:]


def test_the_optimizer_steps_in_the_backward_pass_with_and_without_callbacks(train, tmp_path):
    plain = train("trainer.gradient_clip_val=null")
    for name in ("default", "none"):
        result = train("optimizer=adamw_in_backward", f"callbacks={name}", folder=tmp_path / name)
        assert result["losses"] == pytest.approx(plain["losses"], rel=1e-5)


def test_the_papers_experiment_trains_a_small_model(train, tmp_path, capsys):
    small = ["model=llama_small", "trainer=cpu", "data.sequence_length=64", "trainer.max_steps=2"]
    result = train("experiment=paper_llama3_8b", *small)

    assert (result["mst_name"], result["precision"], result["steps"]) == ("paper", "bf16-true", 2)
    assert "OptimizerInBackward" in (tmp_path / "run" / ".hydra" / "config.yaml").read_text(encoding="utf-8")


@pytest.fixture
def saved_model(tmp_path):
    """A folder with a model, as save_pretrained writes it."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    from_config(config).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def hf(tiny):
    """The tiny run's overrides for a model that is not described by a config."""
    return [override for override in tiny if not override.startswith("model.")]


def test_a_model_in_a_local_folder_trains(hf, saved_model, tmp_path):
    main(
        ["train", *hf, "model=hf", f"model.name='{saved_model}'", "data.tokenizer=null", f"hydra.run.dir='{tmp_path}'"]
    )

    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["model"] == "hf"
    assert result["parameters"] == sum(weight.numel() for weight in from_pretrained(str(saved_model)).parameters())


@pytest.fixture
def run_badly(tiny, tmp_path, capsys):
    """Run with a mistake; check that it ends with code 1 and no stack trace; return what stderr says."""

    def run(*overrides: str, base: list[str] | None = None) -> str:
        with pytest.raises(SystemExit) as exit_info:
            main(["train", *(tiny if base is None else base), f"hydra.run.dir='{tmp_path}'", *overrides])
        assert exit_info.value.code == 1
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    return run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("precision=fp8", "Could not find 'precision/fp8'"),
        ("trainer.precision=fp8", "trainer: Precision 'fp8' is invalid"),
        ("strategy=mst_dpp", "Could not find 'strategy/mst_dpp'"),
        ("strategy=mst_fsdp", "strategy: FSDP1 trains on GPUs only. On CPUs, use strategy=mst_model_parallel"),
        ("trainer.strategy=mst_dpp", "trainer.strategy: There is no strategy 'mst_dpp'. Did you mean mst_ddp or"),
        ("trainer.strategy=lightning_mst.Nothing", "strategy: "),
        ("ckpt_path=no/such.ckpt", "ckpt_path: There is no checkpoint 'no/such.ckpt', neither file nor folder"),
        ("data.sequence_length=0", "data.sequence_length should be a whole number, 2 or more, got 0"),
        ("data.sequence_length=long", "data.sequence_length should be a whole number, 2 or more, got 'long'"),
        ("data.batch_size=null", "data.batch_size should be a whole number, 1 or more, got None"),
        ("data.sequence_length=1000000", "data: One sequence of sequence_length=1000000 tokens must fit"),
        ("data.paths=[no/such/file.txt]", "no/such/file.txt"),
        ("model.config.vocab_size=100", "The tokenizer has 300 entries, but the model's embedding has only 100."),
        ("model.config.hidden_size=33", "The hidden size (33) is not a multiple of the number of attention heads"),
        ("model.attn_implementation=magic", "magic"),
        ("+trainer.max_stps=3", "trainer: Trainer.__init__() got an unexpected keyword argument 'max_stps'"),
        ("trainer.max_stps=3", "Key 'max_stps' is not in struct"),
        ("mst=everything", "Could not find 'mst/everything'"),
        ("mst.mlp_chunks=many", "many"),
        ("mst.checkpoint_layers=some", "some"),
        ("mst.mlp_modules=nowhere", "nowhere"),
    ],
)
def test_a_mistake_ends_in_a_short_message(run_badly, override, message):
    assert message in run_badly(override)


def test_steps_in_the_backward_pass_with_clipped_gradients_are_refused_without_callbacks_too(run_badly):
    error = run_badly("callbacks=none", "optimizer=adamw_in_backward", "trainer.gradient_clip_val=1.0")

    assert "gradient_clip_val=1.0 (set it to None; in our program, trainer.gradient_clip_val=null)" in error


def test_a_missing_model_name_is_asked_for(run_badly, hf):
    assert "Missing: model.name. Say, for example, model.name=..." in run_badly("model=hf", base=hf)


def test_a_model_that_does_not_exist_is_named(run_badly, hf, tmp_path):
    error = run_badly("model=hf", f"model.name='{tmp_path}/nothing'", "data.tokenizer=null", base=hf)

    assert "model: " in error
    assert "nothing" in error


def test_a_real_error_keeps_its_stack_trace(tiny, tmp_path, capsys, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr("lightning_mst.models.from_config", broken)
    with pytest.raises(SystemExit):
        main(["train", *tiny, f"hydra.run.dir='{tmp_path}'"])

    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "RuntimeError: the disk is on fire" in error


def test_missing_keys_are_found_however_deep_they_are():
    config = {"a": {"b": "???", "c": 1}, "d": ["x", {"e": "???"}], "f": "${a.b}"}

    assert missing_keys(config) == ["a.b", "d.1.e"]


def test_a_number_that_json_does_not_know_becomes_null(tmp_path):
    write_result(tmp_path, {"loss": math.nan, "losses": [1.0, math.inf], "steps": 2})

    assert json.loads((tmp_path / "result.json").read_text()) == {"loss": None, "losses": [1.0, None], "steps": 2}
