"""DeepSpeed's ZeRO-2 and ZeRO-3 on two processes against the unmodified model on one, with the batches of both."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from typing import Any

# Read by DeepSpeed when it is imported; the processes started below inherit it.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("peft")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import Tensor, nn

from lightning_mst import apply_mst
from lightning_mst.ops.deferred_logits import DeferredLogitsWarning
from lightning_mst.rewrite.zero3 import gather_whole_blocks

RANKS, STEPS, V, D = 2, 3, 97, 32
SIZES = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V, "pad_token_id": None}
GATED = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", GATED),
    "tied": ("Llama", {**GATED, "tie_word_embeddings": True}),
    "Gemma 2": ("Gemma2", {**GATED, "head_dim": 8, "attn_implementation": "eager"}),
    "OPT": ("OPT", {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": D, "max_position_embeddings": 64, "dropout": 0.0}),
    "BERT": (
        "Bert",
        {**SIZES, "intermediate_size": 64, "is_decoder": True, "hidden_dropout_prob": 0.0}
        | {"attention_probs_dropout_prob": 0.0},
    ),
}


@dataclass(frozen=True)
class Case:
    model: str
    stage: int = 3
    chunks: int | str | None = 3  # None: the unmodified model
    checkpoint: bool = True
    born_in_pieces: bool = False
    only_mlps: bool = False
    adapters: bool = False
    whole_layer: bool = False
    lengths: tuple[int, int] = (13, 13)


CASES = {
    "Llama, stage 2": Case("Llama", stage=2),
    "tied, stage 2": Case("tied", stage=2, checkpoint=False),
    "Llama": Case("Llama"),
    "Llama, more mini-sequences": Case("Llama", chunks=6),
    "Llama, not checkpointed": Case("Llama", checkpoint=False),
    "Llama in pieces from the start": Case("Llama", born_in_pieces=True),
    "Llama, MLPs trained alone": Case("Llama", only_mlps=True),
    "Llama, adapters on MLPs and head": Case("Llama", adapters=True),
    "Llama, ranks with more or fewer mini-sequences": Case("Llama", chunks="paper", lengths=(70, 40)),
    "tied": Case("tied"),
    "tied, not checkpointed": Case("tied", checkpoint=False),
    "tied in pieces from the start": Case("tied", born_in_pieces=True),
    "norm after the MLP": Case("Gemma 2"),
    "norm after the MLP, in pieces from the start": Case("Gemma 2", born_in_pieces=True),
    "projections without a module": Case("OPT"),
    "method": Case("BERT", born_in_pieces=True),
    "whole layers": Case("Llama", whole_layer=True),
    "whole layers with norms after the blocks": Case("Gemma 2", whole_layer=True, born_in_pieces=True),
}
PLAIN = {
    "Llama": Case("Llama", chunks=None),
    "Llama, not checkpointed": Case("Llama", chunks=None, checkpoint=False),
    "tied": Case("tied", chunks=None),
    "norm after the MLP": Case("Gemma 2", chunks=None),
    "projections without a module": Case("OPT", chunks=None),
}


@dataclass
class Outcome:
    """Largest differences from the reference (loss: in nats; else: of the tensor's largest entry), and traffic."""

    loss: float = 0.0
    gradient: float = 0.0
    weight: float = 0.0
    gathered: int = 0  # numbers per step
    reduced: int = 0
    owners: list[str] = field(default_factory=list)
    asked_for_logits: list[str] = field(default_factory=list)


def build(case: Case) -> nn.Module:
    torch.manual_seed(0)
    family, options = MODELS[case.model]
    kind = "BertLMHeadModel" if family == "Bert" else f"{family}ForCausalLM"
    model = getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**options)).train()
    if case.only_mlps:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".mlp." in name)
    if case.adapters:
        import peft

        targets = ["gate_proj", "up_proj", "down_proj", "lm_head"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, target_modules=targets))
    return model


def batches(case: Case) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randint(3, V, (1, n), generator=generator) for n in case.lengths] for _ in range(STEPS)]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def reference(case: Case) -> tuple[list[list[float]], dict[str, Tensor], dict[str, Tensor]]:
    """Each rank's losses, the gradients of the last step, and the weights after it."""
    model, losses, gradients = build(case), [], {}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in batches(case):
        of_ranks = [loss_of(model, ids) for ids in step]
        torch.stack(of_ranks).mean().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item() for loss in of_ranks])
    return losses, gradients, {n: p.detach() for n, p in model.named_parameters()}


def difference(value: Tensor, expected: Tensor) -> float:
    # Some gradients are zero but for rounding, as those of the attention's key biases.
    return ((value - expected).abs().max() / expected.abs().max().clamp_min(1e-3)).item()


class Traffic:
    """Counts the numbers that DeepSpeed's all-gathers and reduce-scatters send."""

    def __init__(self) -> None:
        import deepspeed

        self.sent = {"allgather_fn": 0, "reduce_scatter_fn": 0}
        for name in self.sent:
            setattr(deepspeed.comm, name, self._counting(name, getattr(deepspeed.comm, name)))

    def _counting(self, name: str, original: Any) -> Any:
        def counting(output: Tensor, given: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sent[name] += max(output.numel(), given.numel())
            return original(output, given, *args, **kwargs)

        return counting


def run(case: Case, rank: int, traffic: Traffic) -> Outcome:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    zero = {
        "stage": case.stage,
        # Nothing stays gathered for later, or models as small as these would be gathered once and for all.
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "gradient_clipping": 0.0}
    config["zero_allow_untested_optimizer"] = True
    losses, gradients, weights = reference(case)
    if case.born_in_pieces:
        start = build(case).state_dict()
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = build(case)
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                if rank == 0:
                    parameter.copy_(start[name])
    else:
        model = build(case)
    handle = None
    if case.chunks is not None:
        layers = "all" if case.checkpoint else "none"
        options = {"layer_chunks": 3, "checkpoint_offload": "inputs"} if case.whole_layer else {}
        handle = apply_mst(model, mlp_chunks=case.chunks, lm_head_chunks=3, checkpoint_layers=layers, **options)
    elif case.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    outcome = Outcome()
    if handle is not None:
        outcome.owners = [type(module).__name__ for module in gather_whole_blocks(handle)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeferredLogitsWarning)
        for step, of_ranks in enumerate(batches(case)):
            traffic.sent = dict.fromkeys(traffic.sent, 0)
            loss = loss_of(engine, of_ranks[rank])
            outcome.loss = max(outcome.loss, abs(loss.item() - losses[step][rank]))
            engine.backward(loss)
            outcome.gathered, outcome.reduced = traffic.sent["allgather_fn"], traffic.sent["reduce_scatter_fn"]
            if step == STEPS - 1:
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad:
                        got = difference(safe_get_full_grad(parameter), gradients[name])
                        outcome.gradient = max(outcome.gradient, got)
            engine.step()
    outcome.asked_for_logits = [str(w.message) for w in caught if w.category is DeferredLogitsWarning]
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=case.stage == 3):
            outcome.weight = max(outcome.weight, difference(parameter.detach(), weights[name]))
    engine.destroy()
    return outcome


def run_rank(rank: int, folder: str) -> None:
    # DeepSpeed's own shared-memory all-reduce would be compiled first.
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    traffic = Traffic()
    found = {
        kind: {name: run(case, rank, traffic) for name, case in cases.items()}
        for kind, cases in (("rewritten", CASES), ("plain", PLAIN))
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Outcome]]]:
    """Of each rank: all cases in one launch, because the imports take longer than they do."""
    folder = tmp_path_factory.mktemp("zero3")
    mp.spawn(run_rank, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_and_weights_are_those_of_the_unmodified_model(name: str, outcomes: list) -> None:
    for of_rank in outcomes:
        outcome = of_rank["rewritten"][name]
        assert outcome.loss < 1e-5
        assert outcome.gradient < 1e-5
        assert outcome.weight < 1e-5


@pytest.mark.parametrize("name", PLAIN)
def test_mini_sequences_gather_no_more_than_the_unmodified_model_and_the_head_once(name: str, outcomes: list) -> None:
    rewritten, plain = outcomes[0]["rewritten"][name], outcomes[0]["plain"][name]
    assert 0 < rewritten.gathered <= plain.gathered + D * V + RANKS
    assert rewritten.reduced == plain.reduced > 0


def test_more_mini_sequences_gather_no_more(outcomes: list) -> None:
    few, many = (outcomes[0]["rewritten"][name] for name in ("Llama", "Llama, more mini-sequences"))
    assert few.gathered == many.gathered
    assert few.reduced == many.reduced


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("Llama", "LlamaMLP"),
        ("norm after the MLP", "Gemma2DecoderLayer"),
        ("norm after the MLP, in pieces from the start", "Gemma2DecoderLayer"),
        ("projections without a module", "OPTDecoderLayer"),
        ("method", "BertLayer"),
    ],
)
def test_the_block_gathers_for_its_parts_or_else_the_layer(name: str, owner: str, outcomes: list) -> None:
    assert outcomes[0]["rewritten"][name].owners == [owner] * 2


def test_a_head_with_adapters_gathers_for_them(outcomes: list) -> None:
    assert outcomes[0]["rewritten"]["Llama, adapters on MLPs and head"].owners == ["LlamaMLP", "LlamaMLP", "Linear"]


def test_without_zero3_nothing_changes(outcomes: list) -> None:
    assert outcomes[0]["rewritten"]["Llama, stage 2"].owners == []


def test_nothing_asks_for_the_logits(outcomes: list) -> None:
    assert {n: o.asked_for_logits for n, o in outcomes[0]["rewritten"].items() if o.asked_for_logits} == {}
