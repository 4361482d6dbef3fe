"""Memory over one step, as data and as a figure."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from lightning_mst import OptimizerInBackward, apply_mst
from lightning_mst.memory.places import Places, blocks_of
from lightning_mst.memory.step_tensors import tensors_of_step
from lightning_mst.memory.timeline import Timeline, groups_of, timeline_of


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=101,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).train()


def recorded(model: nn.Module, *, in_backward: bool = False) -> Timeline:
    handle = apply_mst(model, mlp_chunks=2, lm_head_chunks=2)
    optimizer = (
        OptimizerInBackward(model.parameters(), torch.optim.SGD, lr=0.1)
        if in_backward
        else torch.optim.AdamW(model.parameters())
    )
    tokens = torch.randint(0, 101, (2, 40))
    places = Places(blocks_of(model))
    with places.followed(), tensors_of_step(model, [optimizer], tokens, places, record=True) as held:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        places.phase = "backward"
        loss.backward()
        places.phase = "optimizer"
        optimizer.step()
    return timeline_of(held, groups_of(model, handle.rows), form="mini-sequences", source="measured")


def test_blocks_are_coloured_by_what_they_are_and_nothing_is_lost():
    timeline = recorded(llama())
    assert {visit.group for visit in timeline.visits} == {
        "embedding", "norm", "attention", "MLP", "rest", "LM head", "loss", "optimizer",
    }  # fmt: skip
    for visit in timeline.visits:
        block = visit.place.block.rpartition(".")[2]
        if visit.place.phase != "optimizer" and block:
            expected = {"self_attn": "attention", "mlp": "MLP", "lm_head": "LM head", "embed_tokens": "embedding"}
            assert visit.group == expected.get(block, "norm")
    assert max(max(visit.live) for visit in timeline.visits) == timeline.peak
    model = llama()
    fixed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) + 2 * 40 * 8  # the batch
    assert timeline.peak > timeline.persistent == fixed


def test_what_happens_between_the_embedding_and_the_layers_is_not_the_loss():
    timeline = recorded(llama())
    forward = [visit.group for visit in timeline.visits if visit.place.phase == "forward"]
    assert "loss" not in forward[: forward.index("LM head")]
    backward = [visit.group for visit in timeline.visits if visit.place.phase == "backward"]
    assert "loss" not in backward[backward.index("LM head") :]


def test_heads_and_mlps_are_known_by_the_rewrite_whatever_their_names():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleList([nn.Linear(4, 4)])
            self.out = nn.Linear(4, 9)

    from lightning_mst.rewrite.handle import Row

    groups = groups_of(Model(), [Row("LM head", "out", "Linear", "M = 2")])
    assert groups["", "out"] == "LM head"
    assert groups["", "body.0"] == "rest"


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_figure_is_drawn_of_one_or_two_courses(tmp_path, in_backward):
    pytest.importorskip("matplotlib")
    from lightning_mst.memory.timeline_plot import plot_timelines

    timeline = recorded(llama(), in_backward=in_backward)
    for count in (1, 2):
        path = tmp_path / f"{count}.png"
        plot_timelines([timeline] * count, "A title", "A note", path)
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 20_000
    data = timeline.as_dict()
    assert data["peak_bytes"] == timeline.peak
    assert data["visits"][0].keys() == {"phase", "layer", "block", "group", "live_bytes"}
