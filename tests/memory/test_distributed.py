"""One of several devices, rehearsed in one process, against real ones."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from memory_tools import CONFIGS, adamw, causal_lm, causal_loss, rehearsed_step, token_batch
from processes import environment
from run_distributed import CASES, LAYERS, LENGTH

from lightning_mst.memory.layers import peaks_of
from lightning_mst.memory.rehearsal import Step, new_fake_mode, rehearse
from lightning_mst.rewrite.handle import apply_mst

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    file = tmp_path_factory.mktemp("distributed") / "totals"
    command = [sys.executable, str(HERE / "run_distributed.py"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=HERE, env=environment())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return pickle.loads(file.read_bytes())


@pytest.mark.parametrize("name", CASES)
def test_a_rank_of_two_holds_at_its_peak_what_was_predicted_in_one_process(name, measured):
    strategy, view, config, optimizer, precision = CASES[name]
    held = rehearsed_step(
        causal_lm(num_hidden_layers=LAYERS),
        token_batch(1, LENGTH),
        causal_loss,
        optimizer,
        CONFIGS[config],
        strategy=strategy,
        num_devices=2,
        gradient_as_bucket_view=view,
        autocast=torch.bfloat16 if precision == "bf16-mixed" else None,
    )
    assert held.peak == pytest.approx(measured[name], rel=1e-3)
    assert not dist.is_initialized()


def rehearsed(strategy: str, num_devices: int):
    return rehearsed_step(
        causal_lm(), token_batch(1, 64), causal_loss, adamw, CONFIGS["off"], strategy=strategy, num_devices=num_devices
    )


def test_more_devices_hold_less_of_a_sharded_model_and_stage_2_keeps_weights_whole():
    two, eight, stage_2 = rehearsed("fsdp2", 2), rehearsed("fsdp2", 8), rehearsed("zero2", 8)
    assert eight.peak < two.peak
    assert eight.peak < stage_2.peak
    assert rehearsed("zero3", 8).peak == eight.peak


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_a_few_layers_speak_for_all_of_a_sharded_model(strategy):
    fake = new_fake_mode()
    with fake:
        model = causal_lm(num_hidden_layers=8)
    apply_mst(model, CONFIGS["recompute"])
    # Few tokens, so that weights decide; their gathering differs in the layers next to the ends.
    step = Step(token_batch(1, 48), causal_loss, adamw, strategy=strategy, num_devices=32)

    def run():
        return rehearse(model, step, fake).peaks

    whole = max(peak.total for peak in run().values())
    assert max(peak.total for peak in peaks_of(model, run, shallow=4).values()) == whole


def test_a_real_process_group_is_in_the_way_and_the_error_says_so():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="belongs to a real one"):
            rehearsed("fsdp2", 2)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("strategy", "num_devices", "message"),
    [("zero1", 2, "single, ddp, fsdp2"), ("single", 2, "Name a strategy for several"), ("ddp", 0, "at least 1")],
)
def test_a_strategy_that_cannot_be_rehearsed_is_named(strategy, num_devices, message):
    with pytest.raises(ValueError, match=message):
        Step({}, causal_loss, adamw, strategy=strategy, num_devices=num_devices)
