"""FSDP1 on two ranks: exact gradients however the model is cut into units, and not one gather more than without us."""

from __future__ import annotations

import copy
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy, size_based_auto_wrap_policy
from torch.utils.data import DataLoader
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2MLP
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

sys.path.insert(0, str(Path(__file__).parent))

from cases import CHUNKS, RANKS, VOCAB, Module, build, rows
from test_communication import CollectiveCounter
from test_exactness import overall

from lightning_mst import MSTCallback, MSTConfig, MSTHandle, apply_mst
from lightning_mst.ops.deferred_logits import DeferredLogits
from lightning_mst.rewrite.fsdp1 import keep_work_in_units
from lightning_mst.rewrite.fsdp1_head import ask_units
from lightning_mst.rewrite.shadow import BoundMethod
from lightning_mst.strategies import MSTFSDPStrategy
from lightning_mst.training.sharding import check_heads, check_tied_weights, layer_policy, wrapped_by


def gemma() -> nn.Module:
    """A norm joins its MLP."""
    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        vocab_size=VOCAB,
        tie_word_embeddings=False,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config).train()


class LowRank(nn.Linear):
    """As a head with an adapter."""

    def __init__(self) -> None:
        super().__init__(16, VOCAB, bias=False)
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, VOCAB)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.up(self.down(input))


def low_rank() -> nn.Module:
    model = build()
    model.lm_head = LowRank()
    return model


class Step(nn.Module):
    """What Lightning wraps: a module whose forward is the training step.

    Args:
        model: the model.
        loss: ``"the model's"``; the ``"step's"`` own; or ``"several"``, of two calls of the head, with metrics.
    """

    def __init__(self, model: nn.Module, loss: str) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, ids: Tensor) -> Tensor:
        if self.loss == "the model's":
            return self.model(input_ids=ids, labels=ids, use_cache=False).loss
        labels = ids[:, 1:]
        if self.loss == "step's":
            logits = self.model(input_ids=ids, use_cache=False).logits
            return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels.reshape(-1))
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden)
        F.cross_entropy(logits[:, -1], ids[:, 0])  # with a graph that backward never sees
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels.reshape(-1))
        loss = loss + 0.1 * logits.logsumexp(-1).square().mean()
        others = self.model.lm_head(0.5 * hidden)
        loss = loss + 0.1 * (others.log_softmax(-1)[..., 0] * logits.logsumexp(-1)).mean() + 0.1 * real(others).mean()
        with torch.no_grad():
            accuracies = [(logits[:, :-1].argmax(-1) == labels).float().mean()]
        accuracies.append((logits[:, :-1].argmax(-1) == labels).float().mean())
        assert all(0 <= accuracy <= 1 for accuracy in accuracies)
        assert not (logits > 1e4).any(-1).any()  # the last to ask the head, and without a gradient
        return loss


def real(logits: Tensor) -> Tensor:
    return logits.real() if isinstance(logits, DeferredLogits) else logits


Policy = Callable[[Step, MSTHandle], Any]


def layers(step: Step, handle: MSTHandle) -> Any:
    return layer_policy(handle.layers)


def layers_and_head(step: Step, handle: MSTHandle) -> Any:
    return layer_policy([*handle.layers, step.model.lm_head])


def no_policy(step: Step, handle: MSTHandle) -> Any:
    return None


def classes(*chosen: type[nn.Module]) -> Policy:
    return lambda step, handle: ModuleWrapPolicy(set(chosen))


@dataclass(frozen=True)
class Case:
    """How a model is sharded, and what it computes.

    Attributes:
        policy: makes the ``auto_wrap_policy``.
        build: makes the model.
        loss: of the ``Step``.
        frozen: a part of the model that is not trained.
        precisions: in which it runs.
    """

    policy: Policy = layers
    build: Callable[[], nn.Module] = build
    loss: str = "the model's"
    frozen: str = ""
    precisions: tuple[str, ...] = ("32-true",)


BOTH = ("32-true", "bf16-mixed")
CASES = {
    "layers": Case(precisions=BOTH),
    "layers, tied": Case(build=partial(build, tied=True)),
    "layers, tied, loss in the step": Case(build=partial(build, tied=True), loss="step's", precisions=BOTH),
    "MLPs": Case(classes(LlamaDecoderLayer, LlamaMLP), loss="step's", precisions=BOTH),
    "MLPs that a norm would join": Case(classes(Gemma2DecoderLayer, Gemma2MLP), build=gemma),
    "a norm in an MLP's mini-sequences": Case(build=gemma),
    "one unit": Case(no_policy),
    "head": Case(layers_and_head, precisions=BOTH),
    "head, loss in the step": Case(layers_and_head, loss="step's", precisions=BOTH),
    "head of two layers": Case(layers_and_head, build=low_rank, loss="step's", precisions=BOTH),
    "head alone trained": Case(layers_and_head, loss="step's", frozen="model", precisions=BOTH),
    "head frozen": Case(layers_and_head, loss="step's", frozen="lm_head", precisions=BOTH),
    "head, several losses": Case(layers_and_head, loss="several", precisions=BOTH),
}
# Each of their losses gathers, where one forward pass of the unit would do.
GATHER_MORE = [name for name, case in CASES.items() if case.loss == "several"]
RUNS = [
    (name, precision, checkpoint)
    for name, case in CASES.items()
    for precision in case.precisions
    for checkpoint in ("all", "none")
]


def freeze(step: Step, case: Case) -> None:
    if case.frozen:
        step.model.get_submodule(case.frozen).requires_grad_(False)


def run(case: Case, precision: str, checkpoint: str, mst: bool) -> dict[str, Any]:
    step = Step(case.build(), case.loss)
    freeze(step, case)
    chunks = CHUNKS if mst else dict.fromkeys(CHUNKS)
    handle = apply_mst(step, checkpoint_layers=checkpoint, **chunks)
    sharded = FullyShardedDataParallel(
        step,
        auto_wrap_policy=case.policy(step, handle),
        use_orig_params=True,
        device_id=torch.device("cpu"),
        mixed_precision=FSDPPrecision(precision).mixed_precision_config,
    )
    keep_work_in_units(sharded)
    ask_units(sharded)
    ids = rows(RANKS, ragged=False)[dist.get_rank()]["input_ids"].unsqueeze(0)
    for _ in range(2):  # the first step has extras
        sharded.zero_grad()
        with CollectiveCounter() as collectives:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = sharded(ids)
            loss.backward()
    with FullyShardedDataParallel.summon_full_params(sharded, with_grads=True):
        gradients = {
            name.replace("_fsdp_wrapped_module.", ""): parameter.grad.double()
            for name, parameter in sharded.named_parameters()
            if parameter.requires_grad
        }
    handle.remove()
    assert not [name for name, module in sharded.named_modules() if "forward" in vars(module)]
    loss = loss.detach()
    dist.all_reduce(loss)
    return {"loss": loss.item() / RANKS, "gradients": gradients, "counts": collectives.counts}


def run_half_a_block() -> None:
    # As a policy by size may cut.
    step = Step(build(), "the model's")
    handle = apply_mst(step, **CHUNKS)
    policy = layer_policy([*handle.layers, *(layer.mlp.down_proj for layer in handle.layers)])
    sharded = FullyShardedDataParallel(
        step, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    sharded(torch.zeros(1, 21, dtype=torch.long))


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    results: dict[Any, Any] = {}
    for name, precision, checkpoint in RUNS:
        for mst in (False, True):
            try:
                results[name, precision, checkpoint, mst] = run(CASES[name], precision, checkpoint, mst)
            except Exception:
                results[name, precision, checkpoint, mst] = {"error": traceback.format_exc()}
    try:
        run_half_a_block()
    except RuntimeError as error:
        results["half a block"] = str(error)
    torch.save(results, f"{folder}/results.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What both ranks wrote down."""
    folder = str(tmp_path_factory.mktemp("fsdp1"))
    mp.spawn(run_rank, (folder,), nprocs=RANKS)
    return [torch.load(f"{folder}/results.{rank}") for rank in range(RANKS)]


def expected(case: Case) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the unmodified model in fp64, given the batches of all ranks."""
    step = Step(case.build().double(), "several" if case.loss == "several" else "step's")
    freeze(step, case)
    loss = step(torch.stack([row["input_ids"] for row in rows(RANKS, ragged=False)]))
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in step.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("name", "precision", "checkpoint"), RUNS)
def test_loss_and_gradients_are_those_of_one_process_with_the_global_batch(
    results: list[dict[Any, Any]], name: str, precision: str, checkpoint: str
) -> None:
    loss, gradients = expected(CASES[name])
    for rank in range(RANKS):
        unmodified, ours = (results[rank][name, precision, checkpoint, mst] for mst in (False, True))
        assert "error" not in unmodified, unmodified["error"]
        assert "error" not in ours, ours["error"]
        if precision == "32-true":
            assert ours["loss"] == pytest.approx(loss, rel=1e-5)
            assert ours["gradients"].keys() == gradients.keys()
            for parameter, wanted in gradients.items():
                distance = (ours["gradients"][parameter] - wanted).norm() / wanted.norm()
                assert distance < 1e-5, parameter
        else:
            limit = 1.1 * overall([unmodified["gradients"]], [gradients])
            assert overall([ours["gradients"]], [gradients]) <= limit


@pytest.mark.parametrize(("name", "precision", "checkpoint"), RUNS)
def test_weights_are_gathered_and_gradients_reduced_as_often_as_without_mini_sequences(
    results: list[dict[Any, Any]], name: str, precision: str, checkpoint: str
) -> None:
    without, ours = (results[0][name, precision, checkpoint, mst]["counts"] for mst in (False, True))
    assert without["all-gather"] > 0
    if name in GATHER_MORE:
        assert ours.pop("all-gather") > without.pop("all-gather")
    assert ours == without


def test_a_unit_of_half_an_mlp_is_refused_before_the_first_step_is_spent(results: list[dict[Any, Any]]) -> None:
    message = results[0]["half a block"]
    assert message.startswith("LlamaMLP can't run in mini-sequences: parts of it are FSDP units")


def test_a_unit_of_a_part_of_the_lm_head_is_refused_before_anything_is_sharded() -> None:
    model = low_rank()
    handle = apply_mst(model, **CHUNKS)
    policy = ModuleWrapPolicy({LlamaDecoderLayer, nn.Linear})
    with pytest.raises(MisconfigurationException, match=r"a unit of lm_head.down, a part of the LM head lm_head"):
        check_heads(handle, wrapped_by(policy, model))
    check_heads(handle, {*handle.layers, model.lm_head})
    handle.update(lm_head_chunks=None)
    check_heads(handle, wrapped_by(policy, model))


# --- which policies keep tied weights together ---------------------------------------------------------------------


def by_size(smallest: int) -> Any:
    return partial(size_based_auto_wrap_policy, min_num_params=smallest)


SPLITTING = {
    "a set of classes": ModuleWrapPolicy({LlamaDecoderLayer, nn.Linear}),
    "a CustomPolicy": CustomPolicy(lambda module: isinstance(module, nn.Embedding)),
    "by size": by_size(VOCAB * 16 - 1),
    "a function": lambda module, recurse, nonwrapped_numel: recurse or isinstance(module, nn.Embedding),
}
KEEPING = {
    "a set of classes": ModuleWrapPolicy({LlamaDecoderLayer}),
    "a CustomPolicy": CustomPolicy(lambda module: isinstance(module, LlamaDecoderLayer)),
    "by size": by_size(10_000),
    "a function": lambda module, recurse, nonwrapped_numel: recurse or isinstance(module, LlamaMLP),
    "no policy": None,
}


@pytest.mark.parametrize("name", SPLITTING)
def test_a_policy_that_splits_tied_weights_is_refused_by_name(name: str) -> None:
    model = build(tied=True)
    with pytest.raises(MisconfigurationException, match=r"embed_tokens.weight and lm_head.weight are one tied weight"):
        check_tied_weights(model, wrapped_by(SPLITTING[name], model))


@pytest.mark.parametrize("name", SPLITTING)
def test_the_same_policies_are_fine_without_a_tie(name: str) -> None:
    model = build(tied=False)
    check_tied_weights(model, wrapped_by(SPLITTING[name], model))


@pytest.mark.parametrize("name", KEEPING)
def test_a_policy_that_keeps_tied_weights_together_passes(name: str) -> None:
    model = build(tied=True)
    check_tied_weights(model, wrapped_by(KEEPING[name], model))


@pytest.mark.parametrize("name", [*SPLITTING, *KEEPING])
def test_wrapped_by_names_the_units_that_fsdp_makes(name: str, tmp_path: Path) -> None:
    for policies in (SPLITTING, KEEPING):
        if name not in policies:
            continue
        model = build()
        copied = copy.deepcopy(model)
        foreseen = {n for n, m in model.named_modules() if m in wrapped_by(policies[name], model)}
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet{len(policies)}", rank=0, world_size=1)
        sharded = FullyShardedDataParallel(
            copied, auto_wrap_policy=policies[name], use_orig_params=True, device_id=torch.device("cpu")
        )
        dist.destroy_process_group()
        units = {
            n.replace("_fsdp_wrapped_module.", "").removesuffix("._fsdp_wrapped_module")
            for n, m in sharded.named_modules()
            if n and isinstance(m, FullyShardedDataParallel)
        }
        assert foreseen == units


# --- through Lightning ---------------------------------------------------------------------------------------------


class OnCPU(MSTFSDPStrategy):
    """Lightning's strategy asks for a GPU; FSDP1 itself does not."""

    def setup_environment(self) -> None:
        FSDPStrategy.setup_environment(self)


class WrappedByUser(Module):
    """Its ``configure_model`` makes the units."""

    parts = "layers"

    def configure_model(self) -> None:
        options = {"use_orig_params": True, "device_id": torch.device("cpu")}
        chosen = self.model.model.layers
        for index, layer in enumerate(chosen):
            if self.parts == "MLPs":
                layer.mlp = FullyShardedDataParallel(layer.mlp, **options)
            chosen[index] = FullyShardedDataParallel(layer, **options)
        if self.parts == "layers and head":
            self.model.lm_head = FullyShardedDataParallel(self.model.lm_head, **options)
        self.model = FullyShardedDataParallel(self.model, **options)


@pytest.fixture
def fsdp_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    make = FullyShardedDataParallel.__init__

    def make_on_cpu(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **{**kwargs, "device_id": torch.device("cpu")})

    monkeypatch.setattr(FullyShardedDataParallel, "__init__", make_on_cpu)


def losses(strategy: Any, accelerator: str, module: Module | None = None, *callbacks: Any) -> list[float]:
    """Of four steps with clipped gradients, so that weights and clipping show in them."""
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        strategy=strategy,
        callbacks=list(callbacks),
        max_steps=4,
        gradient_clip_val=0.1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = module or Module(build(tied=True))
    module.train_dataloader = lambda: DataLoader(rows(8, ragged=False), batch_size=2)
    module.on_before_optimizer_step = lambda optimizer: None
    trainer.fit(module)
    return module.losses


@pytest.mark.usefixtures("fsdp_on_cpu")
@pytest.mark.parametrize(
    "policy",
    [{}, {"auto_wrap_policy": {LlamaDecoderLayer, LlamaMLP}}, {"auto_wrap_policy": None}],
    ids=["our policy", "the user's", "none"],
)
def test_the_strategy_with_clipping_by_norm_trains_the_same_weights_as_on_one_device(policy: dict[str, Any]) -> None:
    wanted = losses("auto", "cpu")
    assert losses(OnCPU(mst=MSTConfig(**CHUNKS), **policy), "cpu") == pytest.approx(wanted, rel=1e-5)


@pytest.mark.usefixtures("fsdp_on_cpu")
def test_the_strategy_trains_with_a_head_that_the_policy_makes_a_unit_and_refuses_a_tied_one() -> None:
    def layers_and_head(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        return recurse or isinstance(module, LlamaDecoderLayer) or getattr(module, "out_features", None) == VOCAB

    wanted = losses("auto", "cpu", Module(build()))
    module, asked = Module(build()), []
    module.on_train_end = lambda: asked.append(vars(module.model.lm_head).get("forward"))
    strategy = OnCPU(mst=MSTConfig(**CHUNKS), auto_wrap_policy=layers_and_head)
    assert losses(strategy, "cpu", module) == pytest.approx(wanted, rel=1e-5)
    assert isinstance(module.model.lm_head, FullyShardedDataParallel)
    assert isinstance(asked[0], BoundMethod)
    with pytest.raises(MisconfigurationException, match="are one tied weight"):
        losses(OnCPU(mst=MSTConfig(**CHUNKS), auto_wrap_policy=layers_and_head), "cpu")


@pytest.mark.usefixtures("fsdp_on_cpu")
@pytest.mark.parametrize("parts", ["layers", "layers and head", "MLPs"])
def test_a_model_that_configure_model_wrapped_keeps_its_units(parts: str) -> None:
    wanted = losses("auto", "cpu", Module(build()))
    module, callback, forms = WrappedByUser(build()), MSTCallback(**CHUNKS), {}
    module.parts = parts
    module.on_train_start = lambda: forms.update({row.block: (row.form, row.reason) for row in callback.handle.rows})
    got = losses(OnCPU(), "cpu", module, callback)
    assert got == pytest.approx(wanted, rel=1e-5)
    assert forms["MLP"] == ("M = 3", "")
    # A head that is a unit already would be asked for its loss when its weights are gone.
    left = ("as it was", "FSDP made it, or a part of it, a unit of its own before the rewrite")
    assert forms["LM head"] == (left if parts == "layers and head" else ("M = 3", ""))


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["mst_fsdp", "mst_deepspeed_stage_3"])
def test_on_a_gpu_clipping_by_norm_trains_the_same_weights_as_on_one_device(strategy: str) -> None:
    if "deepspeed" in strategy:
        pytest.importorskip("deepspeed")
    wanted = losses("mst", "gpu", None, MSTCallback(**CHUNKS))
    assert losses(strategy, "gpu", None, MSTCallback(**CHUNKS)) == pytest.approx(wanted, rel=1e-5)
