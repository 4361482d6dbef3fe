"""Optimizers on the host in the program: what they don't go with is told before any work."""

from __future__ import annotations

import os

# Read by DeepSpeed when it is imported.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest

from lightning_mst.program.errors import ConfigurationError
from lightning_mst.program.history import History
from lightning_mst.program.optimizer import check_optimizer
from lightning_mst.program.plan_config import compose_runs, read_run
from lightning_mst.program.train import build_recipe, build_trainer


def checked(compose_config, *overrides):
    config = compose_config("trainer=cpu", "logger=none", "callbacks=none", "model=llama_small", *overrides)
    check_optimizer(build_recipe(config).optimizer, build_trainer(config, History()))


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["optimizer=adamw_cpu_offload"], ["a CPU (use optimizer=adamw, which is on the host there)"]),
        (
            ["optimizer=adamw_cpu_offload", "strategy=mst_ddp", "trainer.accumulate_grad_batches=2"],
            ["MSTDDPStrategy (use one device", "accumulate_grad_batches=2 (set it to 1, or offload_gradients=False"],
        ),
        (["optimizer=adamw_cpu_offload", "strategy=mst_model_parallel"], ["MSTModelParallelStrategy (use one device"]),
        (
            ["optimizer=deepspeed_cpu_adam"],
            ["Add strategy=mst_deepspeed_stage_3_offload, or choose optimizer=adamw, or adamw_cpu_offload on one GPU"],
        ),
        (["optimizer=deepspeed_cpu_adam", "strategy=mst_ddp"], ["Add strategy=mst_deepspeed_stage_3_offload"]),
    ],
)
def test_what_an_optimizer_on_the_host_does_not_go_with_is_told_with_what_to_choose(
    compose_config, overrides, messages
):
    with pytest.raises(ConfigurationError) as refused:
        checked(compose_config, *overrides)
    for message in messages:
        assert message in str(refused.value)


def test_gradients_that_stay_on_the_device_may_be_accumulated(compose_config):
    with pytest.raises(ConfigurationError) as refused:
        checked(
            compose_config,
            "optimizer=adamw_cpu_offload", "optimizer.offload_gradients=false", "trainer.accumulate_grad_batches=2",
        )  # fmt: skip
    assert "accumulate" not in str(refused.value)  # the CPU alone is wrong


@pytest.mark.parametrize("stage", ["mst_deepspeed_stage_3", "mst_deepspeed_stage_3_offload"])
def test_a_deepspeed_strategy_takes_the_optimizer_for_where_its_states_are(compose_config, stage):
    pytest.importorskip("deepspeed")
    config = compose_config(f"strategy={stage}", "logger=none", "callbacks=none")
    from lightning_mst.program.strategy import build_strategy

    class Trainer:
        strategy = build_strategy(config.strategy)

    fitting, other = ("deepspeed_cpu_adam", "adamw") if stage.endswith("offload") else ("adamw", "deepspeed_cpu_adam")
    check_optimizer(build_recipe(compose_config(f"optimizer={fitting}")).optimizer, Trainer())
    with pytest.raises(ConfigurationError, match="need each other"):
        check_optimizer(build_recipe(compose_config(f"optimizer={other}")).optimizer, Trainer())


@pytest.mark.parametrize(
    ("overrides", "strategy", "bytes_per_weight"),
    [
        (["optimizer=adamw_cpu_offload"], "single", 8),
        (["optimizer=deepspeed_cpu_adam", "strategy=mst_deepspeed_stage_3_offload", "trainer.devices=4"],
         "zero3_offload", 5),
    ],
)  # fmt: skip
def test_a_plan_of_either_knows_what_the_host_takes(overrides, strategy, bytes_per_weight):
    from lightning_mst.memory.setting import Setting
    from lightning_mst.models import count_parameters
    from lightning_mst.rewrite.config import MSTConfig

    pytest.importorskip("torchao")
    config = compose_runs(["auto"], ["precision=bf16-true", "model.config.vocab_size=500", *overrides])["auto"]
    run = read_run(config)
    assert run.training.strategy == strategy
    setting = Setting(run.build_model, run.training)
    prediction = setting.predict(MSTConfig(), 128)
    assert prediction.host == pytest.approx(bytes_per_weight * count_parameters(setting.model), rel=0.01)
    assert prediction.kinds["optimizer_states"] + prediction.kinds["gradients"] < prediction.host / 1000
