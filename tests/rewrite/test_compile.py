"""torch.compile before and after the rewrite: the same gradients, and graphs that break at the two ops alone."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from families import build as build_family
from rewrite_models import VOCAB, PlainTransformer, build, distance, furthest, gradients, hf_loss, plain_loss
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lightning_mst import apply_mst
from lightning_mst.ops import linear_cross_entropy, token_wise
from lightning_mst.ops.deferred_logits import DeferredLogits

OPTIONS = {"mlp_chunks": 4, "lm_head_chunks": 4}
OURS = ("BoundMethod", "DeferredLogits", "DeferredTensor")


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def strangers() -> list[str]:
    """The reasons of graph breaks that are not ours."""
    return [reason for reason in counters["graph_break"] if not any(name in reason for name in OURS)]


@pytest.mark.parametrize("when", ["before", "after", "after a step"])
@pytest.mark.parametrize("checkpoint_layers", ["all", "none"])
def test_the_order_of_compilation_and_rewrite_does_not_matter(when, checkpoint_layers, batch):
    model = build("Llama 3", torch.float32)
    expected = gradients(model, hf_loss(model, *batch))
    compiled = model
    if when != "after":
        compiled = torch.compile(model, backend="aot_eager")
    if when == "after a step":
        hf_loss(compiled, *batch).backward()
        counters.clear()
    handle = apply_mst(compiled, checkpoint_layers=checkpoint_layers, **OPTIONS)
    if when == "after":
        compiled = torch.compile(model, backend="aot_eager")
    output = compiled(input_ids=batch[0], labels=batch[1], use_cache=False)
    assert isinstance(output.logits, DeferredLogits)
    assert distance(gradients(model, output.loss), expected) < 1e-5
    assert counters["stats"]["calls_captured"] > 0
    assert strangers() == []
    handle.remove()
    output = compiled(input_ids=batch[0], labels=batch[1], use_cache=False)
    assert not isinstance(output.logits, DeferredLogits)
    assert distance(gradients(model, output.loss), expected) < 1e-5


@pytest.mark.parametrize("family", ["Gemma 2", "GPT-2", "Phi-3", "Llama, tied"])
def test_other_families_compile_to_the_same_gradients(family, batch):
    model = build(family, torch.float32)
    expected = gradients(model, hf_loss(model, *batch))
    apply_mst(model, checkpoint_layers="none", **OPTIONS)
    compiled = torch.compile(model, backend="aot_eager")
    assert distance(gradients(model, hf_loss(compiled, *batch)), expected) < 1e-5


@pytest.mark.parametrize("family", ["mixtral", "opt"])
def test_experts_and_pairs_of_projections_compile_to_the_same_gradients(family, batch):
    model = build_family(family)
    expected = gradients(model, hf_loss(model, *batch))
    apply_mst(model, **OPTIONS)
    compiled = torch.compile(model, backend="aot_eager")
    assert furthest(gradients(model, hf_loss(compiled, *batch)), expected) < 1e-5


def test_equal_layers_share_their_graphs(batch):
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph.forward

    model = PlainTransformer(layers=3)
    apply_mst(model, checkpoint_layers="none", **OPTIONS)
    compiled = torch.compile(model, backend=count)
    expected = gradients(model, plain_loss(model, *batch))
    assert distance(gradients(model, plain_loss(compiled, *batch)), expected) < 1e-5
    # A layer's part before its MLP and the part after it.
    assert len(graphs) == 2
    assert graphs[0] >= 10


@pytest.mark.skipif(shutil.which("g++") is None, reason="TorchInductor needs a C++ compiler")
def test_with_the_default_compiler_the_gradients_are_the_same(batch):
    model = build("Llama 3", torch.float32)
    expected = gradients(model, hf_loss(model, *batch))
    apply_mst(model, checkpoint_layers="none", **OPTIONS)
    compiled = torch.compile(model)
    for _ in range(2):
        assert distance(gradients(model, hf_loss(compiled, *batch)), expected) < 1e-5


@pytest.mark.parametrize("checkpoint_layers", ["all", "none"])
def test_layers_that_are_compiled_one_by_one_are_exact(checkpoint_layers, batch):
    model = build("Llama 3", torch.float32)
    expected = gradients(model, hf_loss(model, *batch))
    apply_mst(model, checkpoint_layers=checkpoint_layers, **OPTIONS)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    assert distance(gradients(model, hf_loss(model, *batch)), expected) < 1e-5
    # Whether torch compiles what is inside a checkpoint with a graph break depends on how the layer calls it.
    assert checkpoint_layers == "all" or counters["stats"]["calls_captured"] > 0


def test_the_ops_inside_a_compiled_function_are_exact():
    torch.manual_seed(0)
    mlp, head = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), nn.Linear(8, VOCAB)
    x, labels = torch.randn(2, 9, 8), torch.randint(VOCAB, (2, 9))
    weights = [*mlp.parameters(), *head.parameters()]

    def plain(x: Tensor) -> Tensor:
        return F.cross_entropy(head(torch.tanh(x + mlp(x * 2))).flatten(0, 1), labels.flatten())

    @torch.compile(backend="aot_eager")
    def ours(x: Tensor) -> Tensor:
        hidden = torch.tanh(x + token_wise(mlp, x * 2, num_chunks=3))
        return linear_cross_entropy(hidden, head.weight, labels, bias=head.bias, num_chunks=3) * 1.0

    expected = torch.autograd.grad(plain(x), weights)
    for new, old in zip(torch.autograd.grad(ours(x), weights), expected, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-7)
