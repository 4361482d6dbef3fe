"""Optimizers by name."""

from __future__ import annotations

import pytest
import torch
from memory_tools import CONFIGS, causal_lm, causal_loss, real_step, rehearsed_step, token_batch

from lightning_mst import OptimizerInBackward
from lightning_mst.memory.devices import DEVICES
from lightning_mst.memory.optimizers import OPTIMIZERS, make_optimizer
from lightning_mst.memory.prediction import predict
from lightning_mst.memory.rehearsal import Step, new_fake_mode
from lightning_mst.on_host import OptimizerOnHost
from lightning_mst.on_host.engine import without_accelerator

SIZES = {"hidden_size": 128, "intermediate_size": 384, "dtype": torch.bfloat16, "num_hidden_layers": 2}


ON_DEVICE = [name for name in OPTIMIZERS if name not in ("adamw_cpu_offload", "deepspeed_cpu_adam")]


@pytest.mark.parametrize("name", [*ON_DEVICE, "adamw_8bit_in_backward", "adafactor_in_backward"])
def test_states_without_values_take_what_real_ones_take(name):
    if "8bit" in name or "fp32" in name:
        pytest.importorskip("bitsandbytes")
    batch, make = token_batch(1, 64), make_optimizer(name)
    watch = real_step(causal_lm(**SIZES), [batch] * 4, causal_loss, make, CONFIGS["recompute"], precision="bf16-true")
    held = rehearsed_step(causal_lm(**SIZES), batch, causal_loss, make, CONFIGS["recompute"])
    assert held.peak == pytest.approx(watch.total, rel=1e-3)


@pytest.mark.parametrize("offload_gradients", [True, False])
def test_a_rehearsed_step_with_its_optimizer_on_the_host_holds_what_a_real_one_holds_on_both(offload_gradients):
    pytest.importorskip("torchao")
    batch, made = token_batch(1, 64), []

    def make(model):
        made.append(OptimizerOnHost(model.parameters(), lr=1e-3, offload_gradients=offload_gradients))
        return made[-1]

    with without_accelerator():
        watch = real_step(
            causal_lm(**SIZES), [batch] * 4, causal_loss, make, CONFIGS["recompute"], precision="bf16-true"
        )
    held = rehearsed_step(causal_lm(**SIZES), batch, causal_loss, make, CONFIGS["recompute"])
    real, rehearsed = made
    # The real optimizer made its states, a half of what it holds, while bytes were followed.
    assert held.peak == pytest.approx(watch.total - real.host_bytes / 2, rel=1e-3)
    on_host = max(peak.kinds["host"] for peak in held.peaks.values())
    assert on_host == pytest.approx(real.host_bytes, rel=1e-3) == rehearsed.host_bytes


def states(name, device="cuda", **options):
    fake = new_fake_mode()
    with fake:
        model = causal_lm(**{**SIZES, "hidden_size": 512, "intermediate_size": 1024})
    step = Step(token_batch(1, 64), causal_loss, make_optimizer(name), on_gpu=device == "cuda", **options)
    prediction = predict(model, step, fake, device=DEVICES[device])
    numbers = sum(p.numel() for p in model.parameters())
    return prediction.kinds["optimizer_states"] / numbers, prediction.host / numbers


def test_states_take_so_many_bytes_for_each_weight():
    pytest.importorskip("bitsandbytes")
    assert states("sgd") == (0, 0)
    assert states("adamw") == (pytest.approx(4, rel=1e-3), 0)
    assert states("adamw_fp32") == (pytest.approx(8, rel=1e-3), 0)
    assert states("adamw_8bit") == (pytest.approx(2, rel=0.03), 0)


def test_paged_states_of_large_weights_are_in_the_hosts_memory_on_a_gpu_alone():
    pytest.importorskip("bitsandbytes")
    on_device, on_host = states("paged_adamw_8bit")
    assert on_host == pytest.approx(2, rel=0.02)
    assert on_device < 0.1
    assert states("paged_adamw_8bit", "cpu") == states("adamw_8bit", "cpu")


def test_on_the_host_one_device_takes_8_bytes_for_each_weight_there_and_deepspeed_20_shared_by_all_devices():
    pytest.importorskip("torchao")
    assert states("adamw_cpu_offload") == (0, pytest.approx(8, rel=0.02))  # norms stay on the device
    for devices in (1, 4):
        host = states("deepspeed_cpu_adam", strategy="zero3_offload", num_devices=devices)
        assert host == (0, pytest.approx(20 / devices, rel=1e-3))
    with pytest.raises(ValueError, match=r"got strategy='single'\. Set strategy='zero3_offload', or another optimizer"):
        states("deepspeed_cpu_adam")


def test_only_what_is_trained_has_states_and_a_name_may_say_that_it_steps_in_the_backward_pass():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    for optimizer in (make_optimizer("sgd_in_backward")(model), make_optimizer("sgd", in_backward=True)(model)):
        assert isinstance(optimizer, OptimizerInBackward)
        assert optimizer.param_groups[0]["params"] == list(model[1].parameters())
        optimizer.remove()


def test_an_unknown_name_is_answered_with_all_names():
    with pytest.raises(
        ValueError, match="adamw, adamw_fp32, adamw_8bit, paged_adamw_8bit, adafactor, sgd, adamw_cpu_offload"
    ):
        make_optimizer("adam")
