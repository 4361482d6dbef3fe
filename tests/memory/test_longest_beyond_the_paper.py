"""What is promised of whole layers in mini-sequences with their inputs on the host, modelled: Llama-3-8B, batch 1.

The best public figure for one 80 GB card is 500K tokens, with the parameters on the host as well.
"""

from __future__ import annotations

import pytest

from lightning_mst.memory.optimizers import make_optimizer
from lightning_mst.memory.planner import mst_setting
from lightning_mst.memory.prediction import Prediction
from lightning_mst.memory.setting import Setting, Training
from lightning_mst.memory.sources import builder_of
from lightning_mst.units import GIB, parse_bytes

K = 1024


def llama(optimizer: str) -> Setting:
    _, build = builder_of("llama3_8b")
    return Setting(build, Training("bf16-true", make_optimizer(optimizer)))


def predicted(setting: Setting, sequence_length: int) -> Prediction:
    return setting.predict(mst_setting("layer_offload"), sequence_length)


@pytest.fixture(scope="module")
def on_device() -> Setting:
    return llama("adamw_in_backward")


@pytest.mark.parametrize(("tokens", "units"), [(64 * K, 12), (256 * K, 10)])
def test_a_step_holds_few_times_the_hidden_state_beside_weights_and_optimizer_states(on_device, tokens, units):
    prediction = predicted(on_device, tokens)
    hidden_state = 4096 * tokens * 2
    rest = prediction.total - prediction.kinds["weights"] - prediction.kinds["optimizer_states"]
    # The driver's context, which 64K tokens make up for a whole unit of, is among it.
    assert rest <= units * hidden_state
    assert prediction.host == pytest.approx(32 * hidden_state, rel=0.001)


@pytest.mark.parametrize(("tokens", "memory", "host_gib"), [(300 * K, "80GiB", 75), (1200 * K, "141GB", 300)])
def test_with_adam_states_on_the_device_a_card_takes(on_device, tokens, memory, host_gib):
    prediction = predicted(on_device, tokens)
    assert prediction.kinds["optimizer_states"] >= 2 * 2 * 8e9
    assert prediction.total <= parse_bytes(memory)
    assert prediction.host / GIB == pytest.approx(host_gib, rel=0.01)


def test_with_the_optimizer_on_the_host_80_gib_take_550k_tokens():
    pytest.importorskip("torchao")
    prediction = predicted(llama("adamw_cpu_offload"), 550 * K)
    assert prediction.kinds["optimizer_states"] == 0
    assert prediction.total <= parse_bytes("80GiB")
    # The layers' inputs; and a copy of the weights, their gradients and two states, two bytes of each.
    assert prediction.host / GIB == pytest.approx(137.5 + 4 * 2 * 8.03e9 / GIB, rel=0.01)
