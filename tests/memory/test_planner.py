"""What a plan promises is what the rehearsal of each step says, and one step further does not fit."""

from __future__ import annotations

import json

import pytest
from memory_tools import adamw, causal_lm
from torch import nn

from lightning_mst import MSTConfig
from lightning_mst.memory import Plan, plan, rungs
from lightning_mst.memory.planner import TooLarge, peak_place
from lightning_mst.memory.prediction import KINDS
from lightning_mst.memory.rungs import with_optimizer_on_host
from lightning_mst.memory.setting import Setting, Training

MIB = 2**20


def build() -> nn.Module:
    # A vocabulary that makes logits matter; two layers need no extrapolation.
    return causal_lm(num_hidden_layers=2, vocab_size=4096)


def small_plan(**options) -> Plan:
    return plan(
        build,
        **{"device_memory": "64MiB", "precision": "32-true", "optimizer": adamw, "device": "cpu", **options},
    )


@pytest.fixture(scope="module")
def planned() -> Plan:
    return small_plan(mst=("off", "auto"), batch_size=2, sequence_length=2500)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting(build, Training(precision="32-true", make_optimizer=adamw, device="cpu"))


def test_each_setting_gets_the_longest_sequence_that_fits(planned, setting):
    for rung in planned.rungs:
        assert rung.prediction == setting.predict(rung.config, rung.max_length, 2)
        assert 0.98 * 64 * MIB < rung.prediction.total <= 64 * MIB
        assert setting.predict(rung.config, int(1.01 * rung.max_length) + 32, 2).total > 64 * MIB
        assert (rung.max_length, rung.prediction.total) in rung.curve
        assert list(rung.curve) == sorted(rung.curve)
    off, auto = planned.rungs
    assert off.max_length < auto.max_length
    assert off.passes.mlp < auto.passes.mlp


def test_a_wanted_length_gets_the_smallest_numbers_of_mini_sequences(planned, setting):
    wanted = planned.wanted
    mlp, head = wanted.config.mlp_chunks, wanted.config.lm_head_chunks

    assert wanted.prediction == setting.predict(MSTConfig(mlp, head), 2500, 2)
    assert wanted.prediction.total <= 64 * MIB
    for fewer in ((mlp - 1, head), (mlp, head - 1)):
        if 0 not in fewer:
            assert setting.predict(MSTConfig(*fewer), 2500, 2).total > 64 * MIB
    assert head > 1


def test_the_numbers_are_plain_json_in_gib(planned):
    report = json.loads(json.dumps(planned.as_dict()))

    assert report["model"] == "build"
    assert report["device_memory_gib"] == 64 / 1024
    for rung, row in zip(planned.rungs, report["rungs"], strict=True):
        assert (row["mst"], row["max_length"], row["mlp_passes"]) == (rung.mst, rung.max_length, rung.passes.mlp)
        assert {"projection_passes", "attention_passes", "lm_head_passes"} <= set(row)
        assert row["optimizer"] is None
        assert list(row["device_gib"]) == list(KINDS)
        assert sum(row["device_gib"].values()) == pytest.approx(rung.prediction.total / 2**30)
        assert row["host_gib"] == 0
        assert row["peak"] == peak_place(rung.prediction)
    assert report["wanted"]["fits"] is True


def test_the_host_limits_a_length_as_the_device_does():
    limit = 2 * MIB
    (rung,) = small_plan(mst=("layer_offload",), host_memory=limit).rungs

    assert 0.95 * limit < rung.prediction.host <= limit
    assert rung.prediction.total < 64 * MIB
    with pytest.raises(TooLarge, match=r"64\.0 MiB and 0\.0 MiB of the host at any length: .* of the host\."):
        small_plan(mst=("layer_offload",), host_memory=1)


@pytest.mark.parametrize(
    ("options", "expected", "package"),
    [
        ({}, "adamw_cpu_offload", "torchao"),
        ({"accumulate_grad_batches": 2}, None, None),
        ({"strategy": "fsdp2", "num_devices": 2}, None, None),
        ({"strategy": "zero3", "num_devices": 2}, "deepspeed_cpu_adam", "deepspeed"),
    ],
)
def test_a_ladder_ends_with_the_optimizer_on_the_host_where_an_engine_does_that(options, expected, package):
    if package is not None:
        pytest.importorskip(package)
    training = Training(precision="32-true", make_optimizer=adamw, device="cpu", **options)
    found = with_optimizer_on_host(build, training)

    assert (found and found[0]) == expected
    if expected == "deepspeed_cpu_adam":
        assert found[1].training.strategy == "zero3_offload"


def test_a_ladder_without_the_engine_of_its_last_rung_names_the_package_at_once(monkeypatch):
    monkeypatch.setattr(rungs, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"torchao: pip install 'lightning-mst\[quantized\]'"):
        small_plan(ladder=True)


def test_a_length_that_nothing_reaches_says_what_it_would_take():
    wanted = small_plan(mst=("recompute",), sequence_length=100_000).wanted

    assert wanted.config is None
    assert wanted.prediction.total > 64 * MIB


def test_a_model_that_never_fits_is_told_at_once_with_what_fills_it():
    with pytest.raises(
        TooLarge, match=r"build does not fit 1\.0 MiB at any length: 32 tokens take [\d.]+ MiB .*optimizer states"
    ):
        small_plan(device_memory="1MiB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_memory": "much"}, "'much' is not an amount of memory"),
        ({"optimizer": "adamwww"}, "optimizer='adamwww' is not known. Expected one of adamw"),
        ({"precision": "fp8"}, "precision='fp8' is not known"),
        ({"mst": ("fast",)}, "There is no conf/mst/fast.yaml. Expected one of auto"),
        ({"batch_size": 0}, "batch_size should be a whole number, 1 or more; got 0"),
        ({"sequence_length": -5}, "sequence_length should be a whole number, 2 or more; got -5"),
    ],
)
def test_wrong_values_are_refused_before_the_model_is_built(options, message):
    def never() -> nn.Module:
        raise AssertionError("was built")

    with pytest.raises(ValueError, match=message):
        plan(never, **{"optimizer": adamw, **options})


def test_learned_positions_end_a_plan_and_refuse_a_longer_wish():
    def gpt2() -> nn.Module:
        return causal_lm("GPT2", num_hidden_layers=2, max_position_embeddings=512)

    options = {"device_memory": "1GiB", "precision": "32-true", "optimizer": adamw, "device": "cpu", "mst": ("auto",)}
    assert plan(gpt2, **options).rungs[0].max_length == 512
    with pytest.raises(ValueError, match="learned positions for only 512"):
        plan(gpt2, sequence_length=513, **options)
