"""An optimizer on the host gives the weights of the same optimizer on the device; torchao's engine without a GPU."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

from lightning_mst import MSTCallback, OptimizerInBackward
from lightning_mst.configurations import conf_dir
from lightning_mst.on_host import OptimizerOnHost, checks
from lightning_mst.on_host.engine import offloading, without_accelerator
from lightning_mst.ops.host_memory import NotEnoughHostMemory

pytest.importorskip("torchao")

WIDTH = 80  # matrices of 6,400 numbers go to the host, biases stay


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """torchao's own engine, whose streams and pinned memory are plain ones."""
    with without_accelerator():
        yield


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def loss_of(net: nn.Module, step: int) -> Tensor:
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))  # (B, D)
    return net(x).square().sum()


def groups(net: nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.03, "weight_decay": 0.5}]


def train(net: nn.Sequential, optimizer: Any, steps: range, *, clip: float = 1.0, micro: int = 1) -> list[float]:
    """A plain loop; returns the norms of the gradients."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda n: 1 / (1 + n), lambda n: 1.0])
    norms = []
    for step in steps:
        optimizer.zero_grad()
        for part in range(micro):
            loss_of(net, 100 * part + step).backward()
        clipped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norms.append(float(nn.utils.clip_grad_norm_(clipped, clip)))
        optimizer.step()
        schedule.step()
    return norms


def assert_same(net: nn.Module, expected: nn.Module) -> None:
    for (name, parameter), other in zip(net.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def hooks_on(net: nn.Module) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in net.parameters())


@pytest.mark.parametrize(("offload", "micro", "dtype"), [(True, 1, torch.bfloat16), (False, 2, torch.float32)])
def test_the_weights_are_bit_for_bit_those_of_the_optimizer_on_the_device(
    on_cpu: None, offload: bool, micro: int, dtype: torch.dtype
) -> None:
    ours, plain = model(), model()
    optimizer = OptimizerOnHost(groups(ours), lr=0.01, offload_gradients=offload)
    norms = train(ours, optimizer, range(3), micro=micro)

    assert norms == train(plain, AdamW(groups(plain), lr=0.01, fused=True), range(3), micro=micro)
    assert_same(ours, plain)
    assert not torch.equal(ours[0].weight, model()[0].weight)


def test_gradients_leave_the_device_in_the_backward_pass_unless_they_are_to_stay(on_cpu: None) -> None:
    for offload in (True, False):
        net = model()
        optimizer = OptimizerOnHost(net.parameters(), lr=0.01, offload_gradients=offload)
        loss_of(net, 0).backward()
        assert (net[0].weight.grad is None) == offload
        assert net[0].bias.grad is not None
        buffers = [parameter.grad for parameter in optimizer.parameters()]
        assert all(buffer is not None for buffer in buffers)
        optimizer.zero_grad()
        loss_of(net, 1).backward()
        assert optimizer.parameters()[0].grad is buffers[0]  # pinned once
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in (*optimizer.parameters(), *net.parameters()))


def test_a_second_gradient_in_a_step_is_no_silent_loss_of_the_first(on_cpu: None) -> None:
    net = model()
    optimizer = OptimizerOnHost(net.parameters(), lr=0.01)
    loss_of(net, 0).backward()
    with pytest.raises(RuntimeError, match="second gradient in one step, which would replace the first on the host"):
        loss_of(net, 1).backward()
    optimizer.zero_grad()
    loss_of(net, 0).backward()


def test_after_a_failed_backward_pass_and_beside_a_second_model_steps_are_as_ever(on_cpu: None) -> None:
    nets = [model(), model()]
    optimizers = [OptimizerOnHost(net.parameters(), lr=0.01) for net in nets]
    plain = model()
    reference = AdamW(plain.parameters(), lr=0.01, fused=True)
    for step in range(2):
        optimizers[0].zero_grad()
        broken = nets[0][0].weight.register_hook(lambda gradient: 1 / 0)  # the last layer's gradients are there by then
        with pytest.raises(ZeroDivisionError):
            loss_of(nets[0], 7).backward()
        broken.remove()
        with torch.no_grad():
            loss_of(nets[0], 8)
        for net, optimizer in ((nets[0], optimizers[0]), (nets[1], optimizers[1]), (plain, reference)):
            optimizer.zero_grad()
            loss_of(net, step).backward()
            optimizer.step()
    assert_same(nets[0], plain)
    assert_same(nets[1], plain)


def test_a_weight_without_a_gradient_keeps_its_value_and_adds_nothing_to_the_norm(on_cpu: None) -> None:
    net = model()
    optimizer = OptimizerOnHost(net.parameters(), lr=0.01)
    train_both = loss_of(net, 0)
    train_both.backward()
    optimizer.step()
    optimizer.zero_grad()
    before = net[2].weight.detach().clone()

    net[0](torch.ones(1, WIDTH)).sum().backward()
    gradients = [parameter.grad for parameter in optimizer.parameters()]
    optimizer.step()

    assert [gradient is None for gradient in gradients] == [False, False, True, True]
    assert torch.equal(net[2].weight, before)


def test_gradients_that_are_set_by_hand_are_stepped_too(on_cpu: None) -> None:
    ours, plain = model(), model()
    for net, optimizer in (
        (ours, OptimizerOnHost(ours.parameters(), SGD, lr=0.1)),
        (plain, SGD(plain.parameters(), lr=0.1)),
    ):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert_same(ours, plain)


def test_checkpoints_go_from_device_to_host_and_back_with_their_options(on_cpu: None) -> None:
    device, host = model(), model()
    on_device = AdamW(groups(device), lr=0.01, fused=True)
    train(device, on_device, range(2))
    on_host = OptimizerOnHost(groups(host), lr=0.7)
    train(host, on_host, range(5, 7))  # states that are to be replaced

    with torch.no_grad():
        for parameter, other in zip(host.parameters(), device.parameters(), strict=True):
            parameter.copy_(other)
    on_host = OptimizerOnHost(groups(host), lr=0.7)  # of the loaded weights
    on_host.load_state_dict(copy.deepcopy(on_device.state_dict()))
    assert on_host.param_groups[0]["lr"] == on_device.param_groups[0]["lr"]
    for net, optimizer in ((host, on_host), (device, on_device)):
        optimizer.zero_grad()
        loss_of(net, 3).backward()
        optimizer.step()
    assert_same(host, device)

    back, expected = on_host.state_dict(), on_device.state_dict()
    assert back["param_groups"] == expected["param_groups"]
    assert back["state"].keys() == expected["state"].keys()
    for place, state in expected["state"].items():
        assert all(torch.equal(value, back["state"][place][name]) for name, value in state.items())


def test_what_it_says_it_takes_of_the_host_is_what_it_holds(on_cpu: None) -> None:
    net = model().bfloat16()
    optimizer = OptimizerOnHost(net.parameters(), lr=0.01)
    net(torch.ones(1, WIDTH, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    held = sum(tensor.nbytes for tensor in optimizer.host_tensors if tensor.dim())
    assert optimizer.host_bytes == held == 8 * 2 * WIDTH * WIDTH


def test_the_newest_takes_over_and_after_remove_nothing_of_it_is_left(on_cpu: None) -> None:
    net, plain = model(), model()
    old = OptimizerOnHost(net.parameters(), lr=0.5)
    new = OptimizerOnHost(net.parameters(), lr=0.01)
    assert hooks_on(net) == 2
    for each, optimizer in ((net, new), (plain, AdamW(plain.parameters(), lr=0.01, fused=True))):
        loss_of(each, 0).backward()
        optimizer.step()
    assert_same(net, plain)

    new.remove()
    assert hooks_on(net) == 0
    assert new.state_dict()["state"]
    alive = weakref.ref(old), weakref.ref(new)
    del old, new, optimizer
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_too_little_host_memory_is_found_before_any_is_taken(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    needed = 16 * 2 * WIDTH * WIDTH
    monkeypatch.setattr(checks, "free_host_memory", lambda: needed - 1)
    with pytest.raises(NotEnoughHostMemory, match=r"needs 0\.2 MiB of the host's memory .* 0\.2 MiB are free\. Train"):
        OptimizerOnHost(net.parameters(), lr=0.01)
    assert hooks_on(net) == 0
    monkeypatch.setattr(checks, "free_host_memory", lambda: needed)
    assert OptimizerOnHost(net.parameters(), lr=0.01).host_bytes == needed


def test_refused_pinned_memory_leaves_the_model_as_it_was(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    empty_like, left = torch.empty_like, [3]  # two for the first weight, then one

    def refuse(tensor: Tensor, **options: Any) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("CUDA error: out of memory")
        return empty_like(tensor, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty_like", refuse)
        with pytest.raises(NotEnoughHostMemory, match=r"refused a part of the 0\.2 MiB .*: CUDA error: out of memory"):
            OptimizerOnHost(net.parameters(), lr=0.01)
    assert hooks_on(net) == 0
    loss_of(net, 0).backward()
    assert net[0].weight.grad is not None


def test_without_a_gpu_it_says_what_to_use_instead() -> None:
    with pytest.raises(ValueError, match=r"on one CUDA or XPU device\. The parameters are on cpu, .* optimizer=adamw"):
        OptimizerOnHost(model().parameters(), lr=0.01)


@pytest.mark.parametrize(
    ("wrapped", "message"),
    [
        (lambda p, **options: OptimizerInBackward(p, SGD, lr=0.1), "both take gradients out of the backward pass"),
        (lambda p, **options: torch.optim.LBFGS(p), "LBFGS runs the closure itself"),
    ],
)
def test_optimizers_that_cannot_go_one_by_one_are_refused(
    on_cpu: None, wrapped: Callable[..., Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerOnHost(model().parameters(), wrapped)


class KeepsStateInGroups(SGD):
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.param_groups[0]["lr"] = self.param_groups[0]["lr"] / 2


def test_state_in_groups_parameters_later_and_copies_are_refused(on_cpu: None) -> None:
    net = model()
    optimizer = OptimizerOnHost(net.parameters(), KeepsStateInGroups, lr=0.1)
    loss_of(net, 0).backward()
    with pytest.raises(RuntimeError, match=r"together in its parameter groups \(lr\)"):
        optimizer.step()
    with pytest.raises(NotImplementedError, match="Give it all groups at once"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(WIDTH, WIDTH))]})
    with pytest.raises(TypeError, match="can't be copied or pickled"):
        copy.deepcopy(optimizer)


def test_a_trainer_that_needs_what_it_gives_away_is_refused_with_all_reasons(on_cpu: None) -> None:
    optimizer = OptimizerOnHost(model().parameters(), lr=0.01)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        strategy=DDPStrategy(),
        accumulate_grad_batches=2,
        plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")),
    )
    with pytest.raises(MisconfigurationException) as refused:
        optimizer.check_trainer(trainer)
    for reason in ("DDPStrategy (use one device", "accumulate_grad_batches=2 (set it to 1", "'16-mixed', which scales"):
        assert reason in str(refused.value)
    scheduled = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        callbacks=[GradientAccumulationScheduler({0: 1, 4: 2})],
    )  # fmt: skip
    with pytest.raises(MisconfigurationException, match="GradientAccumulationScheduler"):
        optimizer.check_trainer(scheduled)
    OptimizerOnHost(model().parameters(), lr=0.01, offload_gradients=False).check_trainer(scheduled)


class Program(LightningModule):
    def __init__(self, *, on_host: bool) -> None:
        super().__init__()
        self.net, self.on_host = model(), on_host

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return loss_of(self.net, self.global_step)  # the same batches after a resumption

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(4), batch_size=1)

    def configure_optimizers(self) -> Any:
        if self.on_host:
            config = OmegaConf.load(conf_dir() / "optimizer" / "adamw_cpu_offload.yaml")
            options = {**OmegaConf.load(conf_dir() / "optimizer" / "adamw.yaml"), **config}
            del options["defaults"]
            optimizer = instantiate(options, _convert_="all")(self.parameters())
        else:
            optimizer = AdamW(self.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        optimizer._step_supports_amp_scaling = False  # or Lightning leaves the clipping of fused optimizers alone
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_the_callback_checks_the_trainer_first_and_takes_the_hooks_off_in_the_end(on_cpu: None) -> None:
    def run(**options: Any) -> Program:
        program = Program(on_host=True)
        settings = {"mlp_chunks": None, "lm_head_chunks": None, "checkpoint_layers": "none"}
        callback = MSTCallback(**settings, on_oom=options.pop("on_oom", "raise"))
        Trainer(
            accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False, callbacks=[callback],
            enable_progress_bar=False, enable_model_summary=False, **options,
        ).fit(program)  # fmt: skip
        return program

    assert hooks_on(run().net) == 0
    with pytest.raises(MisconfigurationException, match="accumulate_grad_batches=2 "):
        run(accumulate_grad_batches=2)
    with pytest.raises(MisconfigurationException, match="half of whose gradients OptimizerOnHost has taken already"):
        run(on_oom="retry")


def fit(folder: Path, *, on_host: bool, steps: int, resume: Path | None = None) -> tuple[Program, Path]:
    program = Program(on_host=on_host)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=steps, gradient_clip_val=0.5, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(program, ckpt_path=resume)
    assert trainer.global_step == steps
    checkpoint = folder / f"{on_host}_{steps}.ckpt"
    trainer.save_checkpoint(checkpoint)
    return program, checkpoint


def test_lightning_clips_schedules_saves_and_resumes_as_with_the_optimizer_on_the_device(
    on_cpu: None, tmp_path: Path
) -> None:
    half, of_device = fit(tmp_path, on_host=False, steps=2)
    half_on_host, of_host = fit(tmp_path, on_host=True, steps=2)
    assert_same(half_on_host, half)

    whole, _ = fit(tmp_path, on_host=False, steps=4)
    for on_host, checkpoint in ((True, of_device), (False, of_host), (True, of_host)):
        assert_same(fit(tmp_path, on_host=on_host, steps=4, resume=checkpoint)[0], whole)


def test_the_engine_is_left_as_it_was_after_a_rehearsal(on_cpu: None) -> None:
    module = offloading()
    OptimizerOnHost(model().parameters(), lr=0.01)
    assert module.torch is torch
    assert "record_stream" not in Tensor.__dict__


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", [True, False])
def test_on_a_gpu_weights_follow_and_only_they_take_its_memory(offload: bool) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8))).cuda()

    ours, plain = build(), build().cpu()
    size = sum(p.nbytes for p in ours.parameters())
    before = torch.cuda.memory_allocated()
    optimizer = OptimizerOnHost(ours.parameters(), lr=0.01, offload_gradients=offload)
    reference = AdamW(plain.parameters(), lr=0.01, fused=True)
    for step in range(3):
        x = torch.randn(4, 1024, generator=torch.Generator().manual_seed(step))
        for net, each in ((ours, optimizer), (plain, reference)):
            each.zero_grad()
            net(x.to(net[0].weight.device)).square().sum().backward()
            each.step()
    for parameter, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.cpu(), other, rtol=1e-4, atol=1e-4)
    taken = torch.cuda.memory_allocated() - before
    assert taken <= (0.1 if offload else 1.1) * size
    assert all(tensor.is_pinned() for tensor in list(optimizer.host_tensors)[: len(list(ours.parameters()))])
