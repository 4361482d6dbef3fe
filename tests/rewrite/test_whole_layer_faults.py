"""What a whole layer in mini-sequences could get wrong without a word: it is right, or raises."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from rewrite_models import BASE, VOCAB, build, distance, gradients
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lightning_mst import apply_mst
from lightning_mst.memory import TensorBytes
from lightning_mst.ops.host_memory import HostMemory
from lightning_mst.ops.region import Region, current_region
from lightning_mst.rewrite import attention as attention_module

LAYER: dict[str, Any] = {"mlp_chunks": 4, "lm_head_chunks": 4, "layer_chunks": 3}
MODES: dict[str, dict[str, Any]] = {
    "not checkpointed": {**LAYER, "checkpoint_layers": "none"},
    "checkpointed": LAYER,
    "on the host": {**LAYER, "checkpoint_offload": "inputs+attention", "offload_fraction": 0.5},
}
SDPA = {"attn_implementation": "sdpa"}
EXACT = 1e-10
modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def _attention_by_groups_of_heads(monkeypatch):
    monkeypatch.setattr(attention_module, "_LEAST_QUERIES", 1)


def tokens() -> Tensor:
    return torch.randint(3, VOCAB, (2, 33), generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module) -> Tensor:
    torch.manual_seed(3)  # for dropout
    logits = model(input_ids=tokens(), use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_exact(model: nn.Module, within: float = EXACT, modes: tuple[str, ...] = tuple(MODES)) -> None:
    expected = gradients(model, loss_of(model))
    for mode in modes:
        handle = apply_mst(model, **MODES[mode])
        assert {row.form for row in handle.rows if row.block == "attention"} == {"M = 3"}
        assert distance(gradients(model, loss_of(model)), expected) < within
        handle.remove()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_that_attention_applies_by_itself_is_not_lost(dropout):
    torch.manual_seed(0)
    config = transformers.Starcoder2Config(**{**BASE, **SDPA}, residual_dropout=dropout)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    rows = [row for row in apply_mst(model, **LAYER).rows if row.block == "attention"]
    assert {row.rewritten for row in rows} == {dropout == 0}
    assert all(row.reason.startswith("is not token-wise around its attention") for row in rows if not row.rewritten)


def test_what_the_forward_pass_drew_the_backward_pass_uses():
    model = build("GPT-2", **SDPA, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    for mode in ("not checkpointed", "checkpointed"):
        handle = apply_mst(model, **MODES[mode])
        grads = gradients(model, loss_of(model))
        torch.manual_seed(0)
        directions = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        values = []
        for step in (1e-6, -2e-6, 1e-6):
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.add_(directions[name], alpha=step)
            values.append(loss_of(model).item())
        slope = sum((grads[name] * directions[name]).sum().item() for name in grads)
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-6)
        handle.remove()


def test_hooks_that_change_what_a_projection_returns_are_differentiated():
    model = build("Llama 3", **SDPA)
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj", "o_proj")):
            module.register_forward_hook(lambda _module, _args, output: torch.tanh(3 * output))
    check_exact(model)


@pytest.mark.parametrize("family", ["Llama 3", "Gemma 2"])  # after Gemma's attention and MLP comes a norm
def test_backward_hooks_of_blocks_see_and_change_the_gradients(family):
    model, seen = build(family), []

    def double(_module: nn.Module, grad_inputs: Any, _grad_outputs: Any) -> Any:
        seen.append(len(grad_inputs))
        return tuple(None if grad is None else 2 * grad for grad in grad_inputs)

    for layer in model.model.layers:
        for block in (layer.input_layernorm, layer.mlp):
            block.register_full_backward_hook(double)
        layer.self_attn.register_full_backward_pre_hook(
            lambda _, grads: tuple(g if g is None else 3 * g for g in grads)
        )
    # Eager attention computes its softmax in fp32.
    check_exact(model, 1e-5, ("not checkpointed", "checkpointed"))
    assert len(seen) == 3 * 4


@modes
def test_each_parameters_hooks_run_once_on_the_whole_gradient(mode):
    model = build("Qwen3", **SDPA)
    expected = gradients(model, loss_of(model))
    apply_mst(model, **MODES[mode])
    calls: list[str] = []
    for name, p in model.named_parameters():
        p.register_hook(lambda grad: 2 * grad)
        p.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    got = gradients(model, loss_of(model))
    assert distance(got, {name: 2 * grad for name, grad in expected.items()}) < EXACT
    assert sorted(calls) == sorted(expected)


@modes
def test_another_adapter_may_be_switched_on_after_the_rewrite(mode):
    pytest.importorskip("peft")
    from adapter_models import add, lora

    model = add(build("Llama 3", **SDPA), lora(["q_proj"]))
    # As many matmuls as before, but others of them have outputs that are read.
    model.add_adapter("other", lora(["k_proj"]))
    model.double().set_adapter("other")
    expected = gradients(model, loss_of(model))
    model.set_adapter("default")
    apply_mst(model, **MODES[mode])
    model.set_adapter("other")
    assert distance(gradients(model, loss_of(model)), expected) < EXACT


def test_adapters_that_multiply_their_matrices_with_an_identity_are_exact():
    pytest.importorskip("peft")
    from adapter_models import add, lora

    check_exact(add(build("Llama 3", **SDPA), lora(use_dora=True)))


class WatchedLayer(LlamaDecoderLayer):
    """A layer in which something may happen after its norms."""

    between: Callable[[Tensor, Tensor], None] = staticmethod(lambda x, normed: None)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        x = hidden_states * 1
        normed = self.input_layernorm(x)
        self.between(x, normed)
        x = x + self.self_attn(hidden_states=normed, **kwargs)[0]
        normed = self.post_attention_layernorm(x)
        self.between(x, normed)
        return x + self.mlp(normed)


def watched() -> nn.Module:
    model = build("Llama 3", **SDPA)
    for layer in model.model.layers:
        layer.__class__ = WatchedLayer
    return model


@modes
def test_who_looks_at_a_norms_output_without_a_graph_takes_none_away(mode, monkeypatch):
    model, seen = watched(), []
    expected = gradients(model, loss_of(model))
    apply_mst(model, **MODES[mode])

    def look(_x: Tensor, normed: Tensor) -> None:
        with torch.no_grad():
            seen.append(normed.abs().mean())

    monkeypatch.setattr(WatchedLayer, "between", staticmethod(look))
    assert distance(gradients(model, loss_of(model)), expected) < EXACT
    assert seen


def test_an_input_that_is_changed_after_the_norm_is_noticed(monkeypatch):
    model = watched()
    apply_mst(model, **LAYER)

    def change(x: Tensor, _normed: Tensor) -> None:
        x.add_(1.0)

    monkeypatch.setattr(WatchedLayer, "between", staticmethod(change))
    with pytest.raises(RuntimeError, match=r"input of LlamaRMSNorm was changed in place .* Change a copy, or set"):
        loss_of(model)


def test_an_operator_that_writes_to_its_arguments_is_computed_again():
    class WritesIntoOutput(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *qkv: Tensor) -> Tensor:
            output = torch.empty_like(qkv[0])
            torch.ops.lightning_mst_tests.attention_into(*qkv, output)
            ctx.save_for_backward(output)
            return output

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            return (grad * ctx.saved_tensors[0],) * 3

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (1, 24)).transpose(1, 2).chunk(3, -1)
            x = x + self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
            return x + self.out(WritesIntoOutput.apply(*self.qkv(x).chunk(3, -1)))

    torch.library.custom_op("lightning_mst_tests::attention_into", _attention_into, mutates_args=("output",))
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    expected = gradients(model, model(x).square().sum())
    apply_mst(model, mlp_chunks=None, lm_head_chunks=None, checkpoint_offload="inputs+attention")
    assert distance(gradients(model, model(x).square().sum()), expected) < EXACT


def _attention_into(query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
    output.copy_((query @ key.mT).softmax(-1) @ value)


def test_layers_on_views_with_gaps_get_their_inputs_back_from_the_host():
    class FirstThree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = torch.cat([block(x[:, :3]), block(x[:, :1].expand(-1, 2, -1))], 1)
            return x

    torch.manual_seed(0)
    model = FirstThree().double()
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    expected = gradients(model, model(x).square().sum())
    apply_mst(model, mlp_chunks=None, lm_head_chunks=None, checkpoint_offload="inputs")
    assert distance(gradients(model, model(x).square().sum()), expected) < EXACT


def test_a_thread_that_evaluates_meets_no_layer_of_the_one_that_trains():
    met: list[Region | None] = []
    region = Region(HostMemory())
    with region.entered(recomputing=False):
        thread = threading.Thread(target=lambda: met.append(current_region()))
        thread.start()
        thread.join()
        assert current_region() is region
    assert met == [None]
    assert current_region() is None


@modes
def test_a_part_that_raises_leaves_a_model_that_trains_right(mode, monkeypatch):
    model = build("Qwen3", **SDPA)
    expected = gradients(model, loss_of(model))
    apply_mst(model, **MODES[mode])
    attention = model.model.layers[0].self_attn
    for part in (attention.k_norm, attention.o_proj):
        for in_backward in (False, True):
            if in_backward and mode == "not checkpointed" and part is attention.o_proj:
                continue  # it is linear: nothing of it runs again

            def fail(module: nn.Module, args: Any, in_backward: bool = in_backward) -> None:
                if (torch._C._current_graph_task_id() != -1) == in_backward:
                    raise KeyboardInterrupt

            hook = part.register_forward_pre_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                loss_of(model).backward()
            hook.remove()
            assert isinstance(attention.config, transformers.Qwen3Config)
            assert distance(gradients(model, loss_of(model)), expected) < EXACT


@modes
def test_settings_that_change_between_forward_and_backward_pass_are_right_or_refused(mode):
    model = build("Qwen3", **SDPA)
    expected = gradients(model, loss_of(model))
    handle = apply_mst(model, **{**MODES[mode], "offload_fraction": 0.0})
    loss = loss_of(model)
    handle.update(layer_chunks=5, mlp_chunks=7)
    assert distance(gradients(model, loss), expected) < EXACT
    loss = loss_of(model)
    handle.remove()
    if mode == "not checkpointed":
        assert distance(gradients(model, loss), expected) < EXACT
    else:
        with pytest.raises(torch.utils.checkpoint.CheckpointError):
            loss.backward()
        assert distance(gradients(model, loss_of(model)), expected) < EXACT


@pytest.fixture
def _no_garbage_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@modes
@pytest.mark.usefixtures("_no_garbage_collection")
def test_nothing_outlives_a_step_with_or_without_its_backward_pass(mode):
    model = build("Qwen3", torch.float32, **SDPA)
    apply_mst(model, **MODES[mode])
    with TensorBytes(model.parameters()) as held:
        for _ in range(3):
            loss_of(model).backward()
            model.zero_grad()
            loss_of(model)
            with torch.no_grad():
                loss_of(model.eval())
            model.train()
            assert held.live == 0
