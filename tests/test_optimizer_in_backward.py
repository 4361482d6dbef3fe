"""Stepping parameters during the backward pass gives the weights of stepping them after it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_mst import apply_mst
from lightning_mst.configurations import conf_dir
from lightning_mst.in_backward import OptimizerInBackward
from lightning_mst.memory import TensorBytes

RANKS, STEPS, VOCAB = 2, 3, 61
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": ADAMW,
    "fused AdamW": partial(ADAMW, fused=True),
    "SGD with momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.01),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.01, initial_accumulator_value=0.1),
}


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_implementation="eager",
        **options,
    )
    return transformers.LlamaForCausalLM(config).train()


def tokens(step: int, rank: int = 0) -> Tensor:
    return torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(10 * step + rank))  # (B, S)


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int] = range(STEPS), rank: int = 0) -> None:
    for step in steps:
        batch = tokens(step, rank)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def trained(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_mini_sequence_models_get_the_wrapped_optimizers_weights_bit_for_bit_and_keep_no_gradients(name: str):
    for options in ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}):
        model = llama(**options)
        model.model.layers[0].self_attn.requires_grad_(False)
        apply_mst(model, mlp_chunks=4, lm_head_chunks=4, checkpoint_layers="all")
        plain = llama(**options)
        plain.model.layers[0].self_attn.requires_grad_(False)
        apply_mst(plain, mlp_chunks=4, lm_head_chunks=4, checkpoint_layers="all")
        frozen = [parameter.clone() for parameter in model.model.layers[0].self_attn.parameters()]
        before = model.model.embed_tokens.weight.detach().clone()

        train(plain, OPTIMIZERS[name](plain.parameters()))
        train(model, OptimizerInBackward(model.parameters(), OPTIMIZERS[name]))

        assert_same_weights(model, plain)
        assert not torch.equal(model.model.embed_tokens.weight, before)
        assert all(map(torch.equal, model.model.layers[0].self_attn.parameters(), frozen))
        assert all(parameter.grad is None for parameter in model.parameters())


class CountsSteps(torch.optim.SGD):
    stepped: list[Tensor]

    def step(self, closure: Any = None) -> None:
        self.stepped += [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        super().step(closure)


def test_each_parameter_is_stepped_once_by_itself_in_backward_and_step_adds_nothing():
    model = llama(tie_word_embeddings=True)
    apply_mst(model, mlp_chunks=4, lm_head_chunks=4, checkpoint_layers="all")
    unused = nn.Parameter(torch.ones(3))
    optimizer = OptimizerInBackward([*model.parameters(), unused], CountsSteps, lr=0.1)
    optimizer.wrapped.stepped = []
    batch = tokens(0)
    for _ in range(2):
        optimizer.wrapped.stepped.clear()
        model(input_ids=batch, labels=batch).loss.backward()
        assert {id(p) for p in optimizer.wrapped.stepped} == {id(p) for p in model.parameters()}
        assert len(optimizer.wrapped.stepped) == len(list(model.parameters()))
        optimizer.step()
        assert len(optimizer.wrapped.stepped) == len(list(model.parameters()))
    assert torch.equal(unused, torch.ones(3))


def test_about_one_gradient_is_alive_at_a_time():
    width, depth = 128, 12
    one = 4 * width * width  # bytes

    def peak(make: Callable[..., Optimizer]) -> int:
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
        optimizer = make(model.parameters(), lr=0.1)
        with TensorBytes(list(model.parameters())) as tracker:
            model(torch.ones(1, width)).sum().backward()
            optimizer.step()
        return tracker.peak

    assert peak(torch.optim.SGD) > depth * one
    assert peak(partial(OptimizerInBackward, optimizer=torch.optim.SGD)) < 2.5 * one


def test_checkpoints_go_both_ways_between_it_and_the_wrapped_optimizer():
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        weights = [p for p in model.parameters() if p.ndim > 1]
        return [{"params": weights, "lr": 0.02}, {"params": [p for p in model.parameters() if p.ndim < 2]}]

    straight = llama()
    train(straight, ADAMW(groups(straight)), range(4))

    in_backward = partial(OptimizerInBackward, optimizer=ADAMW)
    for first, second in ((ADAMW, in_backward), (in_backward, ADAMW), (in_backward, in_backward)):
        model = llama()
        optimizer = first(groups(model))
        train(model, optimizer, range(2))
        saved = copy.deepcopy(optimizer.state_dict())
        assert [group["lr"] for group in saved["param_groups"]] == [0.02, 0.01]
        if isinstance(optimizer, OptimizerInBackward):
            optimizer.remove()

        resumed = second([{**group, "lr": 1.0} for group in groups(model)])  # overruled by what is loaded
        resumed.load_state_dict(saved)
        train(model, resumed, range(2, 4))
        assert_same_weights(model, straight)


def test_state_that_the_wrapped_optimizer_has_from_the_start_is_kept():
    weight = nn.Parameter(torch.ones(2))
    optimizer = OptimizerInBackward([weight], torch.optim.Adagrad, initial_accumulator_value=0.5)
    assert optimizer.state[weight]["sum"].tolist() == [0.5, 0.5]


def test_schedulers_change_what_the_next_backward_does():
    models = [llama(), llama()]
    for model, make in zip(models, (ADAMW, partial(OptimizerInBackward, optimizer=ADAMW)), strict=True):
        optimizer = make(model.parameters())
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=6)  # betas, too
        for step in range(6):
            train(model, optimizer, [step])
            if step < 5:
                scheduler.step()
    assert_same_weights(*models)


def test_groups_can_be_added_and_gradients_set_by_hand_are_stepped():
    models = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, make in zip(models, (ADAMW, partial(OptimizerInBackward, optimizer=ADAMW)), strict=True):
        optimizer = make(model[0].named_parameters())
        optimizer.add_param_group({"params": model[1].named_parameters(), "lr": 0.5})
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert_same_weights(*models)
    assert len(optimizer.param_groups) == 2


def test_step_runs_a_closure_with_gradients_and_returns_its_loss():
    model = nn.Linear(2, 1)
    optimizer = OptimizerInBackward(model.parameters(), torch.optim.SGD, lr=0.1)
    before = model.weight.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(before.sum().item() + model.bias.item() + 0.1)
    torch.testing.assert_close(model.weight, before - 0.1)


def test_a_second_gradient_in_one_step_is_an_error():
    model = nn.Linear(2, 1)
    optimizer = OptimizerInBackward(model.parameters(), torch.optim.SGD, lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match=r"second gradient in one step.*Call step"):
        model(torch.ones(1, 2)).sum().backward()
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()


def test_a_new_one_takes_over_and_a_removed_one_is_the_plain_optimizer():
    model = nn.Linear(2, 1)
    old = OptimizerInBackward(model.parameters(), torch.optim.SGD, lr=100.0)
    new = OptimizerInBackward(model.parameters(), torch.optim.SGD, lr=0.5)
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    torch.testing.assert_close(model.weight, before - 0.5)
    old.remove()
    new.step()
    model(torch.ones(1, 2)).sum().backward()
    torch.testing.assert_close(model.weight, before - 1)
    new.step()
    new.remove()
    model(torch.ones(1, 2)).sum().backward()
    torch.testing.assert_close(model.weight, before - 1)
    new.step()
    torch.testing.assert_close(model.weight, before - 1.5)

    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(new)


class SharesState(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        super().step(closure)


def test_optimizers_that_see_all_parameters_together_are_refused_by_name():
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="LBFGS runs the closure itself"):
        OptimizerInBackward(model.parameters(), torch.optim.LBFGS)
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer.*got list"):
        OptimizerInBackward(model.parameters(), list)
    with pytest.raises(ValueError, match="already"):
        OptimizerInBackward(model.parameters(), partial(OptimizerInBackward, optimizer=torch.optim.SGD))
    optimizer = OptimizerInBackward(model.parameters(), SharesState)
    with pytest.raises(RuntimeError, match=r"SharesState keeps state of all parameters .*\(count\)"):
        model(torch.ones(1, 2)).sum().backward()
    optimizer.remove()


def test_the_configuration_wraps_adamw_with_the_options_of_adamw():
    conf = conf_dir() / "optimizer"
    config = OmegaConf.merge(OmegaConf.load(conf / "adamw.yaml"), OmegaConf.load(conf / "adamw_in_backward.yaml"))
    del config["defaults"]
    optimizer = instantiate(config, _convert_="all")(nn.Linear(2, 1).parameters())
    assert isinstance(optimizer.wrapped, torch.optim.AdamW)
    assert optimizer.param_groups[0]["lr"] == config.lr
    assert tuple(optimizer.defaults["betas"]) == tuple(config.betas)


# With Lightning


class Connect(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, OptimizerInBackward):
                optimizer.connect(trainer)


class Module(LightningModule):
    def __init__(self, in_backward: bool, manual: bool = False) -> None:
        super().__init__()
        self.model = llama()
        self.in_backward, self.automatic_optimization = in_backward, not manual

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.lr_schedulers().step()
        return loss

    def configure_optimizers(self) -> Any:
        make = partial(OptimizerInBackward, optimizer=ADAMW) if self.in_backward else ADAMW
        optimizer = make(self.parameters())
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> DataLoader:
        return DataLoader([tokens(step, self.global_rank) for step in range(STEPS)], batch_size=None)


def trainer_for(folder: Path, **options: Any) -> Trainer:
    options = {"max_epochs": 2, "accelerator": "cpu", "callbacks": [Connect()], **options}
    return Trainer(
        logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options
    )


def test_a_trainer_saves_and_resumes_and_gets_the_plain_optimizers_weights(tmp_path: Path):
    plain, straight, manual = Module(False), Module(True), Module(True, manual=True)
    for module in (plain, straight, manual):
        trainer = trainer_for(tmp_path, enable_checkpointing=False)
        trainer.fit(module)
        assert trainer.global_step == 2 * STEPS
    assert_same_weights(straight, plain)
    assert_same_weights(manual, plain)

    halfway = Module(True)
    trainer = trainer_for(tmp_path, max_epochs=1)
    trainer.fit(halfway)
    path = trainer.checkpoint_callback.best_model_path
    for module in (halfway, Module(True), Module(False)):  # the first has been trained, and gets a new optimizer
        trainer_for(tmp_path, enable_checkpointing=False).fit(module, ckpt_path=path)
        assert_same_weights(module, plain)


def test_a_trainer_that_needs_all_gradients_together_is_refused_with_every_reason(tmp_path: Path):
    class Clips(Module):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None: ...

    scheduler = GradientAccumulationScheduler({1: 2})
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    trainer = trainer_for(tmp_path, gradient_clip_val=1.0, plugins=[scaled], callbacks=[Connect(), scheduler])
    with pytest.raises(MisconfigurationException) as caught:
        trainer.fit(Clips(True))
    for text in ("gradient_clip_val=1.0", "configure_gradient_clipping", "GradientAccumulationScheduler", "16-mixed"):
        assert text in str(caught.value)
    with pytest.raises(MisconfigurationException, match=r"accumulate_grad_batches=3 \(set it to 1"):
        trainer_for(tmp_path, accumulate_grad_batches=3).fit(Module(True))

    trainer = trainer_for(tmp_path)
    trainer._accelerator_connector.strategy = FSDPStrategy()
    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy \(use one device"):
        OptimizerInBackward(Module(True).parameters(), ADAMW).connect(trainer)


# With several processes


class Watches(torch.optim.AdamW):
    """Notes the bytes of gradients that are alive at each step."""

    def step(self, closure: Any = None) -> None:
        grads = [parameter.grad for parameter in self.watched if parameter.grad is not None]
        self.most = max(self.most, sum(grad.nbytes for grad in grads))
        super().step(closure)


def check_ddp(rank: int) -> None:
    def build(**options: Any) -> DistributedDataParallel:
        model = llama(tie_word_embeddings=True)
        model.model.layers[0].self_attn.requires_grad_(False)
        apply_mst(model, mlp_chunks=4, lm_head_chunks=4, checkpoint_layers="all")
        return DistributedDataParallel(model, bucket_cap_mb=0.004, **options)  # 6 buckets

    for view in (False, True):
        plain, model, mixed = (build(gradient_as_bucket_view=view) for _ in range(3))
        train(plain, ADAMW(trained(plain)), rank=rank)

        optimizer = OptimizerInBackward(trained(model), Watches, lr=0.01, weight_decay=0.1)
        optimizer.wrapped.watched, optimizer.wrapped.most = trained(model), 0
        optimizer.attach(model)
        train(model, optimizer, [0], rank)
        optimizer.wrapped.most = 0  # DDP's first step has one bucket, from which it learns how to cut the others
        train(model, optimizer, range(1, STEPS), rank)
        assert_same_weights(model, plain)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert 0 < optimizer.wrapped.most < 0.5 * sum(parameter.nbytes for parameter in trained(model))

        # Several optimizers on one model: two in the backward pass, and a plain one beside them.
        parts = [trained(mixed)[0::3], trained(mixed)[1::3], trained(mixed)[2::3]]
        optimizers = [OptimizerInBackward(part, ADAMW) for part in parts[:2]]
        for each in optimizers:
            each.attach(mixed)
        optimizers.append(ADAMW(parts[2]))
        for step in range(STEPS):
            batch = tokens(step, rank)
            mixed(input_ids=batch, labels=batch).loss.backward()
            assert all(parameter.grad is None for parameter in parts[0] + parts[1])
            for each in optimizers:
                each.step()
                each.zero_grad()
        assert_same_weights(mixed, plain)

    alone = llama()
    optimizer = OptimizerInBackward(alone.parameters(), ADAMW)
    with pytest.raises(RuntimeError, match=r"all 2\. Call attach"):
        train(alone, optimizer)
    optimizer.attach(alone)
    train(alone, optimizer)
    for option in ("find_unused_parameters", "static_graph"):
        with pytest.raises(ValueError, match=f"DDP's {option}=True"):
            OptimizerInBackward(trained(model), ADAMW).attach(build(**{option: True}))
    hooked = build()
    hooked.register_comm_hook(None, allreduce_hook)
    with pytest.raises(ValueError, match="communication hook"):
        OptimizerInBackward(trained(hooked), ADAMW).attach(hooked)
    flat = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="use FSDP2's fully_shard"):
        OptimizerInBackward(flat.parameters(), ADAMW).attach(flat)


def check_fsdp2(rank: int) -> None:
    def build() -> nn.Module:
        model = llama()
        apply_mst(model, mlp_chunks=4, lm_head_chunks=4, checkpoint_layers="all")
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    mesh = init_device_mesh("cpu", (RANKS,))
    plain, model, resumed = build(), build(), build()
    train(plain, ADAMW(plain.parameters()), range(4), rank)

    optimizer = OptimizerInBackward(model.parameters(), ADAMW)
    train(model, optimizer, range(2), rank)
    assert all(parameter.grad is None for parameter in model.parameters())
    states = copy.deepcopy(get_state_dict(model, optimizer))
    second = OptimizerInBackward(resumed.parameters(), ADAMW)
    set_state_dict(resumed, second, model_state_dict=states[0], optim_state_dict=states[1])
    for each, steps in ((model, optimizer), (resumed, second)):
        train(each, steps, range(2, 4), rank)
        for (name, parameter), expected in zip(each.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(parameter.to_local(), expected.to_local()), name


def check_lightning_ddp(rank: int, folder: str) -> None:
    modules = Module(False), Module(True)
    for module in modules:
        strategy = DDPStrategy(process_group_backend="gloo")
        trainer_for(Path(folder), strategy=strategy, devices=RANKS, enable_checkpointing=False).fit(module)
    assert_same_weights(*modules)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    # As torchrun sets them, for Lightning.
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ.update({name: str(value) for name, value in ranks.items()}, TORCHELASTIC_RUN_ID="test")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    check_ddp(rank)
    check_fsdp2(rank)
    check_lightning_ddp(rank, folder)
    dist.destroy_process_group()


def test_ddp_and_fsdp2_on_two_ranks_get_the_plain_optimizers_weights(tmp_path: Path):
    mp.spawn(run_rank, (str(tmp_path),), nprocs=RANKS)
