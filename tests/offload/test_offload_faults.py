"""What goes wrong between forward and backward pass leaves nothing behind, on the host or on the device."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from offload_models import LAYERS, PlainModel, build, distance, gradients, leaves_nothing, loss_of, offload_of, tokens
from torch import Tensor, nn

from lightning_mst import apply_mst
from lightning_mst.memory.tensor_bytes import TensorBytes
from lightning_mst.ops import free_host_memory as free_module
from lightning_mst.ops import host_memory as host_module
from lightning_mst.ops.host_memory import NotEnoughHostMemory
from lightning_mst.rewrite import offloading as offloading_module

OPTIONS = {"mlp_chunks": 3, "lm_head_chunks": None}
MODES = ("inputs", "inputs+attention")


@pytest.mark.parametrize("what", MODES)
def test_too_little_host_memory_is_said_after_the_first_layer_with_what_is_needed(what, monkeypatch):
    model = build()
    expected = gradients(model)
    handle = apply_mst(model, **OPTIONS, checkpoint_offload=what)
    with leaves_nothing(handle):
        # Each layer's input takes 2 * 33 * 32 * 8 bytes; with attention its output and 2 * 4 * 33 * 8 bytes besides.
        each = 2**16 * (1 if what == "inputs" else 3)
        calls: list[nn.Module] = []
        hooks = [layer.register_forward_hook(lambda module, *_: calls.append(module)) for layer in model.model.layers]
        with monkeypatch.context() as patch:
            patch.setattr(offloading_module, "free_host_memory", lambda: (LAYERS - 1) * each - 1)
            needed = (
                f"needs {LAYERS * each / 2**20:.1f} MiB of host memory: {each / 2**20:.1f} MiB for each of 3 layers"
            )
            for _ in range(2):  # a step that is tried again is refused again
                with pytest.raises(NotEnoughHostMemory, match=f"{needed}; .* are available. Take shorter sequences"):
                    loss_of(model)
        assert len(calls) <= 2  # transformers 5.0 calls a layer's hooks inside of its checkpoint
        for hook in hooks:
            hook.remove()
        gc.collect()
        assert offload_of(handle).memory.in_use == 0
        assert distance(gradients(model), expected) < 1e-10


def test_the_need_of_all_processes_on_a_machine_counts(monkeypatch):
    monkeypatch.setattr(free_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(free_module.dist, "get_world_size", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert free_module.processes_here() == 8
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert free_module.processes_here() == 4
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    assert free_module.processes_here() == 16
    model = build()
    apply_mst(model, **OPTIONS, checkpoint_offload="inputs")
    monkeypatch.setattr(offloading_module, "free_host_memory", lambda: 2**20)
    with pytest.raises(NotEnoughHostMemory, match=r"in each of 16 processes on this machine; 2\.0 MiB are"):
        loss_of(model)


def raise_in_forward(model: nn.Module) -> None:
    logits = model(input_ids=tokens(), use_cache=False).logits
    assert logits.requires_grad
    raise KeyboardInterrupt


def raise_in_backward(model: nn.Module) -> None:
    def fail(grad: Tensor) -> None:
        raise KeyboardInterrupt

    logits = model(input_ids=tokens(), use_cache=False, output_hidden_states=True)
    logits.hidden_states[1].register_hook(fail)  # two layers have their inputs back, the third is on its way
    logits.logits.sum().backward()


def refuse_memory(model: nn.Module) -> None:
    def refuse(*_: object) -> None:
        raise NotEnoughHostMemory("none left")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_module.HostMemory, "_allocate", refuse)
        with pytest.raises(NotEnoughHostMemory):
            loss_of(model)
    raise KeyboardInterrupt


@pytest.mark.parametrize("fault", [raise_in_forward, raise_in_backward, refuse_memory])
@pytest.mark.parametrize("what", MODES)
def test_a_step_that_fails_leaves_nothing_and_the_next_one_is_right(fault, what):
    model = build()
    expected = gradients(model)
    handle = apply_mst(model, **OPTIONS, checkpoint_offload=what)
    with leaves_nothing(handle):
        if fault is not refuse_memory:
            gradients(model)
        model.zero_grad()
        gc.collect()
        held = TensorBytes()
        with held:
            before = held.live
            try:
                fault(model)
            except KeyboardInterrupt:
                pass
            else:
                pytest.fail("it was to raise")
            model.zero_grad()
            gc.collect()
            assert held.live == before
            assert offload_of(handle).memory.in_use == 0
        assert distance(gradients(model), expected) < 1e-10


@pytest.mark.parametrize("what", MODES)
def test_evaluation_between_the_steps_of_an_accumulated_gradient_moves_nothing(what):
    model = build()
    expected = gradients(model, lambda model: 2 * loss_of(model))
    handle = apply_mst(model, **OPTIONS, checkpoint_offload=what)
    with leaves_nothing(handle):
        memory = offload_of(handle).memory
        model.zero_grad()
        loss_of(model).backward()
        taken = memory.allocated
        with torch.no_grad():
            train_loss = loss_of(model)  # in train mode, as without Lightning
        model.eval()
        with torch.no_grad():
            loss = loss_of(model, input_ids=tokens(4, 60))
        second = loss_of(model, input_ids=tokens())
        assert torch.equal(second, train_loss)
        assert memory.in_use == 0
        del second
        assert memory.allocated == taken
        model.train()
        loss_of(model).backward()
        assert memory.allocated == taken
        assert loss.isfinite()
        assert distance({name: p.grad for name, p in model.named_parameters()}, expected) < 1e-10


def test_longer_and_shorter_sequences_share_the_slabs():
    model = build()
    handle = apply_mst(model, **OPTIONS, checkpoint_offload="inputs")
    with leaves_nothing(handle):
        memory = offload_of(handle).memory
        sizes = []
        for length in (33, 700, 33, 300, 700):
            gradients(model, lambda model, length=length: loss_of(model, input_ids=tokens(2, length)))
            sizes.append(memory.allocated)
        assert sizes[1] == sizes[2] == sizes[4]
        assert sizes[1] > sizes[0]


@pytest.mark.parametrize(
    ("attention", "said"), [("eager", "attn_implementation is 'eager'"), (None, "several operators")]
)
def test_attention_that_is_not_one_operator_is_refused_in_the_first_forward_pass(attention, said):
    options: dict[str, Any] = {**OPTIONS, "checkpoint_offload": "inputs+attention"}
    if attention is not None:
        model = build(attn_implementation=attention)
        handle = apply_mst(model, **options)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"no checkpointed layer ran any: .*{said}.*'sdpa'"):
                loss_of(model)
    else:
        plain = PlainModel().double()
        handle = apply_mst(plain, **{**options, "mlp_chunks": None})
        from unittest.mock import patch

        def by_hand(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
            return (query @ key.mT).softmax(-1) @ value

        with patch.object(F, "scaled_dot_product_attention", by_hand), pytest.raises(RuntimeError, match=said):
            plain(tokens())
    gc.collect()
    with leaves_nothing(handle):
        pass


def test_an_input_that_a_layer_overwrites_is_noticed():
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x.add_(self.linear(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Overwrites() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model = Model()
    apply_mst(model, mlp_chunks=None, lm_head_chunks=None, checkpoint_offload="inputs")
    with pytest.raises(RuntimeError, match="changed in place"):
        model(torch.randn(2, 4, requires_grad=True) * 1)


def test_a_tensor_that_is_made_of_others_is_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    model = PlainModel()
    handle = apply_mst(model, mlp_chunks=None, lm_head_chunks=None, checkpoint_offload="inputs")
    x = torch.randn(2, 5, 32, requires_grad=True)
    with pytest.raises(TypeError, match="can't move a TwoTensor"):
        model.blocks[0](scale=1.0, hidden=TwoTensor(x, x.clone()) * 1)
    with leaves_nothing(handle):
        pass
