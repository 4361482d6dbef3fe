"""Bytes on the device and on the host: predicted, and tracked in real steps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "memory"))

from memory_tools import adamw, causal_lm, causal_loss, real_step, rehearsed_step, token_batch
from offload_models import KV_HEADS

from lightning_mst import MSTConfig
from lightning_mst.memory.tensor_bytes import TensorBytes

TOLERANCE = 1e-3  # of the 3 %
LAYERS, WIDTH, LENGTH = 4, 64, 1024
INPUT = 4 * LENGTH * WIDTH  # 256 KiB: a slab of its own, without waste
LOG_SUM_EXP = 4 * LENGTH * 4  # 16 KiB, in the smallest slab
SMALLEST = 2**16


def most_in_last_layer(held: TensorBytes) -> int:
    """The peak in the backward pass of the last layer: gradients of the others are not there yet."""
    return max(
        p.total for at, p in held.peaks.items() if at.phase == "backward" and at.layer.endswith(f".{LAYERS - 1}")
    )


def most_on_host(held: TensorBytes) -> int:
    return max(peak.kinds.get("host", 0) for peak in held.peaks.values())


def compare(what: str | None, layer_chunks: int | None = None) -> tuple[int, int]:
    """The same in a real step and in a rehearsal; returns the device's peak in the last layer, and the host's."""
    batch = token_batch(1, LENGTH)
    config = MSTConfig(4, 8, layer_chunks=layer_chunks, checkpoint_offload=what)
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "num_key_value_heads": KV_HEADS}
    watch = real_step(causal_lm(**sizes), [batch] * 2, causal_loss, adamw, config, batch=1)
    held = rehearsed_step(causal_lm(**sizes), batch, causal_loss, adamw, config)
    assert held.peak == pytest.approx(watch.total, rel=TOLERANCE)
    assert most_in_last_layer(held) == pytest.approx(most_in_last_layer(watch.held), rel=TOLERANCE)
    assert most_on_host(held) == most_on_host(watch.held)
    return most_in_last_layer(watch.held), most_on_host(watch.held)


def test_predicted_bytes_on_device_and_host_are_those_of_real_steps():
    without, nothing = compare(None)
    inputs, inputs_on_host = compare("inputs")
    attention, both_on_host = compare("inputs+attention")
    assert nothing == 0
    assert inputs_on_host == LAYERS * INPUT
    assert both_on_host == LAYERS * (2 * INPUT + SMALLEST)
    # Two of the inputs are on the device: the one in use, and the one before it. With attention's results as well.
    assert inputs == pytest.approx(without - (LAYERS - 2) * INPUT, abs=INPUT / 10)
    assert inputs < attention <= inputs + 2 * (INPUT + LOG_SUM_EXP)


def test_they_are_of_whole_layers_in_mini_sequences():
    _, both_on_host = compare("inputs+attention", layer_chunks=3)
    assert both_on_host == LAYERS * (2 * INPUT + SMALLEST)


def test_sharded_steps_are_predicted_with_their_host_memory():
    batch = token_batch(1, LENGTH)
    for strategy in ("ddp", "fsdp2"):
        config = MSTConfig(4, 8, checkpoint_offload="inputs")
        model = causal_lm(num_hidden_layers=3, hidden_size=WIDTH, dtype=torch.float32)
        held = rehearsed_step(model, batch, causal_loss, adamw, config, strategy=strategy, num_devices=2)
        assert most_on_host(held) == 3 * INPUT
