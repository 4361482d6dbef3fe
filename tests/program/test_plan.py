"""``lightning-mst plan``: what is planned is the run that ``train`` would be, and mistakes are told in a line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from lightning_mst.cli import main
from lightning_mst.in_backward import OptimizerInBackward
from lightning_mst.memory.rungs import LADDER
from lightning_mst.program.plan_arguments import parse
from lightning_mst.program.plan_config import Run, compose_runs, device_count, mst_config, read_run

SMALL = [
    "trainer=cpu",
    "data.vocab_size=512",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=2",
]


def read(*overrides: str, **options) -> Run:
    return read_run(compose_runs(["auto"], overrides)["auto"], **options)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_plan_is_a_table_a_figure_and_numbers(here, capsys):
    main(["plan", "--memory", "64MiB", "--length", "2_000", "--mst", "off", "auto", *SMALL, "data.batch_size=2"])

    text = capsys.readouterr().out
    report = json.loads((here / "outputs/plan/plan.json").read_text(encoding="utf-8"))
    off, auto = report["rungs"]
    assert (report["model"], report["batch_size"], report["device_memory_gib"]) == ("llama_small", 2, 64 / 1024)
    assert 0 < off["max_length"] < auto["max_length"]
    for word in (
        f"{off['max_length']:,}",
        f"{auto['max_length']:,}",
        auto["peak"],
        "optimizer",
        "MLP",
        "64.00 MiB (--memory)",
    ):
        assert word in text
    assert f"mst.mlp_chunks={report['wanted']['mlp_chunks']} mst.lm_head_chunks=" in text
    assert (here / "outputs/plan/plan.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in here.rglob("*")) == ["outputs", "plan", "plan.json", "plan.png"]


def test_a_ladder_is_a_table_a_figure_and_numbers_up_to_the_optimizer_on_the_host(here, capsys):
    pytest.importorskip("torchao")
    main(["plan", "--ladder", "--memory", "24MiB", "--host-memory", "1GiB", *SMALL])

    text = capsys.readouterr().out
    report = json.loads((here / "outputs/plan/plan.json").read_text(encoding="utf-8"))
    rungs = {row["optimizer"] or row["mst"]: row for row in report["rungs"]}
    assert list(rungs) == [*LADDER, "adamw_cpu_offload"]
    assert report["rungs"][-1]["mst"] == LADDER[-1]
    lengths = {name: row["max_length"] for name, row in rungs.items()}
    assert lengths["off"] < lengths["paper"] < lengths["layer"] < lengths["layer_offload"]
    assert lengths["layer_offload_attention"] < lengths["adamw_cpu_offload"]
    hosts = {name: row["host_gib"] for name, row in rungs.items()}
    assert hosts["layer"] == 0 < hosts["layer_offload"] < hosts["layer_offload_attention"] < hosts["adamw_cpu_offload"]
    assert [row["attention_passes"] for row in rungs.values()] == [3.5, 4.5, 4.5, 4.5, 4.5, 3.5, 3.5]
    assert [row["projection_passes"] for row in rungs.values()] == [3, *6 * [4]]

    assert report["host_memory_gib"] == 1
    assert "24.00 MiB and 1024.00 MiB of the host (--memory)" in text
    assert "at most 1.00 GiB" in text
    for name, row in rungs.items():
        assert name in text
        assert f"{row['max_length']:,}" in text
        assert f"{row['host_gib'] * 1024:.2f}" in text
    assert (here / "outputs/plan/plan.png").read_bytes().startswith(b"\x89PNG")


def test_json_alone_leaves_nothing_else_on_stdout_and_nothing_on_the_disk(here, capsys):
    main(["plan", "--json", "--memory", "64MiB", "--mst", "off", *SMALL])

    report = json.loads(capsys.readouterr().out)
    assert {"model", "device_memory_gib", "rungs"} <= set(report)
    assert {"mst", "max_length", "device_gib", "host_gib", "mlp_passes"} <= set(report["rungs"][0])
    assert list(here.iterdir()) == []


def test_what_was_measured_on_a_cpu_is_what_was_predicted(here, capsys):
    main(["plan", "--measure", "--json", "n.json", "--length", "200", "--mst", "off", "paper", *SMALL])

    report = json.loads(Path("n.json").read_text(encoding="utf-8"))
    assert [row["mst"] for row in report["rungs"]] == ["off", "paper"]
    for row in report["rungs"]:
        assert row["predicted_gib"] == pytest.approx(row["measured_gib"], rel=0.03)
        assert row["overhead_gib"] is None
    assert "No GPU was used" in capsys.readouterr().out


def test_each_part_of_a_run_means_what_it_means_to_train():
    run = read(
        "model=llama3_8b", "precision=bf16-true", "optimizer=adamw_in_backward", "strategy=mst_model_parallel",
        "trainer.devices=8", "+trainer.num_nodes=2", "data.batch_size=3",
    )  # fmt: skip

    assert (run.model, run.batch_size, run.sequence_length) == ("llama3_8b", 3, 4096)
    assert (run.training.precision, run.training.strategy, run.training.num_devices) == ("bf16-true", "fsdp2", 16)
    optimizer = run.training.make_optimizer(nn.Linear(2, 2))
    assert isinstance(optimizer, OptimizerInBackward)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    with torch.device("meta"):
        assert sum(p.numel() for p in read("model=llama3_8b", layers=2).build_model().parameters()) < 2e9


def test_the_settings_of_a_run_are_its_own():
    configs = compose_runs(["off", "auto"], ["mst.checkpoint_layers=2"])

    assert [mst_config(config).checkpoint_layers for config in configs.values()] == [2, 2]
    assert [mst_config(config).mlp_chunks for config in configs.values()] == [None, "auto"]


@pytest.mark.parametrize(
    ("overrides", "strategy", "num_devices"),
    [
        ([], "single", 1),
        (["trainer.devices=4"], "ddp", 4),
        (["strategy=mst"], "single", 1),
        (["strategy=mst_ddp_spawn", "trainer.devices=[0,1]"], "ddp", 2),
        (["trainer.strategy=ddp", "trainer.devices='2'"], "ddp", 2),
        (["strategy=mst_fsdp", "trainer.devices=2"], "fsdp2", 2),
        (["strategy=mst_fsdp", "strategy.sharding_strategy=SHARD_GRAD_OP", "trainer.devices=2"], "zero2", 2),
        (["strategy=mst_deepspeed_stage_2", "trainer.devices=2"], "zero2", 2),
        (["trainer.strategy=deepspeed_stage_3", "trainer.devices=2"], "zero3", 2),
    ],
)
def test_strategies_are_known_by_what_they_shard(overrides, strategy, num_devices):
    training = read(*overrides).training
    assert (training.strategy, training.num_devices) == (strategy, num_devices)


def test_without_a_number_there_are_as_many_devices_as_here():
    assert device_count("auto") == device_count(-1) == max(1, torch.cuda.device_count())


def test_a_local_folder_is_planned_without_its_weights(tmp_path):
    transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4
    ).save_pretrained(tmp_path)

    run = read("model=hf", f"model.name='{tmp_path}'", layers=2)

    assert run.model == str(tmp_path)
    assert len(run.build_model().model.layers) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=hf"], "Missing: model.name. Say, for example, model.name=..."),
        (["model=llama4"], "Could not find 'model/llama4'"),
        (["optimizer=adamwww"], "Could not find 'optimizer/adamwww'"),
        (["optimizer._target_=torch.optim.AdamWWW"], "optimizer: "),
        (["trainer.precision=fp8"], "precision='fp8' is not known"),
        (["trainer.strategy=dpp"], "There is no strategy 'dpp'. Did you mean"),
        (["strategy=mst_deepspeed_stage_2", "strategy.offload_optimizer=true"], "stage 3 with weights and optimizer"),
        (["strategy=mst_deepspeed_stage_3_offload", "trainer.devices=2"], "need each other. Add optimizer=deepspeed"),
        (["optimizer=deepspeed_cpu_adam"], "need each other. Add strategy=mst_deepspeed_stage_3_offload"),
        (["optimizer=adamw_cpu_offload", "strategy=mst_ddp", "trainer.devices=2"], "works for one GPU, got ddp"),
        (["optimizer=adamw_cpu_offload", "trainer=cpu"], "works for one GPU, got a CPU"),
        (["optimizer=adamw_cpu_offload", "trainer.accumulate_grad_batches=2"], "set optimizer.offload_gradients=false"),
        (["strategy=mst", "trainer.devices=2"], "is for one device, got 2"),
        (["trainer.devices=0"], "trainer.devices should be a number, a list, or 'auto', got 0"),
        (["data.batch_size=0"], "data.batch_size should be a whole number, 1 or more, got 0"),
        (["quantization=nf4"], "Add an adapter"),
        (["optimizer=adamw_in_backward", "trainer.accumulate_grad_batches=2"], "cannot accumulate gradients"),
        (["model.config.hidden_size=33"], "The hidden size (33)"),
        (["model=hf", "model.name=./nowhere"], "No causal language model can be built from './nowhere'"),
    ],
)
def test_a_mistake_is_told_without_a_stack_trace(overrides, message, here, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["plan", "--json", "--mst", "auto", *overrides])

    error = capsys.readouterr().err
    assert exit_info.value.code == 1
    assert error.startswith("lightning-mst plan: ")
    assert message in error
    assert "Traceback" not in error


def test_a_model_that_is_too_large_comes_with_what_to_add(here, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["plan", "--memory", "512KiB", "--mst", "auto", *SMALL])

    error = capsys.readouterr().err
    assert exit_info.value.code == 1
    assert "llama_small does not fit 0.5 MiB at any length" in error
    assert "Add precision=bf16-true optimizer=adamw_in_backward, or precision=nf4-lora" in error


def test_a_configuration_that_lacks_a_size_is_refused(here, capsys):
    (here / "config.json").write_text('{"model_type": "llama", "vocab_size": 100, "num_hidden_layers": 2}')
    with pytest.raises(SystemExit) as exit_info:
        main(["plan", "model=hf", f"model.name='{here}'"])

    assert exit_info.value.code == 1
    assert "does not say hidden_size" in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_extra_that_brings_it(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit) as exit_info:
        main(["plan", "adapter=lora", *SMALL])

    assert exit_info.value.code == 1
    assert "pip install 'lightning-mst[peft]'" in capsys.readouterr().err


def test_without_matplotlib_the_numbers_are_written_and_the_extra_named(here, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "lightning_mst.program.plan_plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)

    main(["plan", "--memory", "64MiB", "--mst", "recompute", "--output", "here", *SMALL])

    assert "pip install 'lightning-mst[plots]'" in capsys.readouterr().out
    assert [path.name for path in Path("here").iterdir()] == ["plan.json"]


def test_overrides_may_stand_anywhere_on_the_command_line():
    arguments = parse(
        ["a=1", "--mst", "off", "b=2", "--json", "c=3", "~logger", "--memory", "24GB", "--length", "8,192"]
    )

    assert arguments.settings == ["off"]
    assert sorted(arguments.overrides) == ["a=1", "b=2", "c=3", "~logger"]
    assert (arguments.json, arguments.memory, arguments.length) == ("-", 24 * 10**9, 8192)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mst", "off", "fast"], "unknown --mst fast; there are auto, "),
        (["--mst", "off", "off"], "--mst names a setting twice"),
        (["--memory", "eighty"], "'eighty' is not an amount of memory"),
        (["--host-memory", "much"], "--host-memory: 'much' is not an amount of memory"),
        (["--ladder", "--mst", "off"], "--ladder has settings of its own"),
        (["--ladder", "--measure"], "--ladder has settings of its own"),
        (["--memory=-1GiB"], "'-1GiB' is not an amount of memory"),
        (["--length=-5"], "--length should be a whole number of tokens, 2 or more, got '-5'"),
        (["--length", "1e5"], "2 or more, got '1e5'"),
        (["mst=paper"], "name its settings after --mst"),
        (["llama3_8b"], "not an override (key=value): llama3_8b"),
    ],
)
def test_a_wrong_command_line_is_explained_and_exits_with_2(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(argv)

    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
