"""``MSTCallback``: mini-sequences for any Lightning program, by one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_mst.memory.peak import PeakMemory
from lightning_mst.ops.chunking import Chunks
from lightning_mst.rewrite.config import MSTConfig
from lightning_mst.rewrite.handle import MSTHandle, apply_mst
from lightning_mst.rewrite.verify import verify

_HALF_PRECISION = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class MSTCallback(Callback):
    """Runs a LightningModule's MLPs and LM head over mini-sequences, in fit, validate, test and predict.

    The rewrite happens after ``configure_model``, so lazily built models are covered, and is taken back at the end and
    after an exception. With everything switched off (``mlp_chunks=None, lm_head_chunks=None,
    checkpoint_layers="none"``) the callback only logs memory, as for a baseline.

    Args:
        mlp_chunks: as in ``MSTConfig``.
        lm_head_chunks: as in ``MSTConfig``.
        checkpoint_layers: as in ``MSTConfig``.
        mlp_modules: as in ``MSTConfig``.
        lm_head_module: as in ``MSTConfig``.
        log_memory: log every training step's peak memory as ``peak_memory_gib`` (GiB) to the loggers and the progress
            bar: the allocator's peak on an accelerator, the process's peak resident size on a CPU.
        verify: before the first training step, compute one batch's loss and gradients with and without mini-sequences
            and stop if they differ. One step of the unmodified model must fit in memory.

    Raises:
        ValueError: at once, for a wrong value; at setup, if there is nothing to rewrite.
        MisconfigurationException: at setup, if ``verify`` is asked for where it can't be done.
        VerificationError: before the first step, if ``verify`` finds a difference.

    Attributes:
        handle: the ``MSTHandle`` of the rewritten model while a Trainer runs, else ``None``.

    Example:
        >>> trainer = Trainer(callbacks=[MSTCallback()])
    """

    def __init__(
        self,
        mlp_chunks: Chunks = "auto",
        lm_head_chunks: Chunks = "auto",
        checkpoint_layers: Literal["all", "none"] | int | Sequence[int] = "all",
        mlp_modules: str | Sequence[str] | None = None,
        lm_head_module: str | None = None,
        log_memory: bool = True,
        verify: bool = False,
    ) -> None:
        self.config = MSTConfig(mlp_chunks, lm_head_chunks, checkpoint_layers, mlp_modules, lm_head_module)
        self.log_memory = log_memory
        self.verify = verify
        self.handle: MSTHandle | None = None
        self._memory: PeakMemory | None = None
        self._printed = False
        self._first_batch = True

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.verify and stage == "fit":
            _check_can_verify(trainer, pl_module)
        self._first_batch = True

        # Lightning calls configure_model next, which may only now build the model.
        def configure_model() -> None:
            _forget_configure_model(pl_module)
            pl_module.configure_model()
            self._apply(trainer, pl_module)

        pl_module.__dict__[_SHADOWED] = pl_module.__dict__.get("configure_model")
        pl_module.__dict__["configure_model"] = configure_model

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown then.
        self._undo(pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._first_batch:
            self._first_batch = False
            self._warn_if_eval_mode(pl_module)
            if self.verify:
                self._verify(trainer, pl_module, batch, batch_idx)
        if self.log_memory:
            if self._memory is None:
                self._memory = self._start_measuring(trainer)
            self._memory.reset()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._memory is None:
            return
        peak = self._memory.read()
        if peak is not None:
            self.log("peak_memory_gib", peak / 2**30, prog_bar=True, on_step=True, reduce_fx="max", sync_dist=True)

    def _apply(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.handle = apply_mst(pl_module, self.config)
        if not self._printed and trainer.is_global_zero and not self.config.asks_for_nothing:
            self.handle.print()
        self._printed = True

    def _undo(self, pl_module: LightningModule) -> None:
        if _SHADOWED in pl_module.__dict__:
            _forget_configure_model(pl_module)
        if self.handle is not None:
            self.handle.remove()
        self.handle, self._memory = None, None

    def _start_measuring(self, trainer: Trainer) -> PeakMemory:
        memory = PeakMemory(trainer.strategy.root_device)
        if not memory.resettable:
            rank_zero_warn(f"peak_memory_gib is the {memory.description}: it can only grow from step to step.")
        if memory.read() is None:
            rank_zero_warn("Nothing on this system measures peak memory, so peak_memory_gib is not logged.")
        return memory

    def _warn_if_eval_mode(self, pl_module: LightningModule) -> None:
        if self.handle is None:
            return
        rows = [row for row in self.handle.rows if row.rewritten]
        asleep = [row for row in rows if not pl_module.get_submodule(row.name).training]
        if asleep:
            checkpointed = any(row.form == "checkpointed" for row in asleep)
            rank_zero_warn(
                f"{len(asleep)} of the {len(rows)} rewritten modules (such as {asleep[0].name}) are in evaluation mode "
                "during training, as Hugging Face's from_pretrained leaves a model and Lightning keeps it: dropout is "
                "off" + (", and so is activation checkpointing" if checkpointed else "") + ". Call model.train() once "
                "after loading it."
            )

    def _verify(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self.handle is not None

        def compute_loss() -> Tensor:
            arguments = [batch]
            if is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2):
                arguments.append(batch_idx)
            with trainer.precision_plugin.train_step_context():
                output = pl_module.training_step(*arguments)
            loss = output["loss"] if isinstance(output, dict) else output
            if not isinstance(loss, Tensor):
                raise MisconfigurationException(
                    f"verify=True needs a training_step that returns a loss; got {type(output).__name__}."
                )
            return loss

        with _without_side_effects(pl_module):
            result = verify(self.handle, compute_loss, dtype=_HALF_PRECISION.get(trainer.precision))
        rank_zero_info(
            f"MSTCallback verified the first batch: the loss differs by {result.loss_difference:.2g} from the "
            f"unmodified model's, gradients by at most {result.gradient_difference:.2g} of their norm "
            f"({result.worst_parameter})"
            + (", in evaluation mode because the model uses dropout." if result.in_eval_mode else ".")
        )


_SHADOWED = "_mst_configure_model"


def _forget_configure_model(pl_module: LightningModule) -> None:
    previous = pl_module.__dict__.pop(_SHADOWED)
    if previous is None:
        del pl_module.__dict__["configure_model"]
    else:
        pl_module.__dict__["configure_model"] = previous


def _check_can_verify(trainer: Trainer, pl_module: LightningModule) -> None:
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise MisconfigurationException(
            f"verify=True compares whole gradients on one device; {type(trainer.strategy).__name__} shards them. "
            "Verify once on a single device with a small model, then train with verify=False."
        )
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "verify=True runs training_step twice more, which manual optimization turns into two more steps. Set "
            "verify=False."
        )


@contextmanager
def _without_side_effects(pl_module: LightningModule) -> Iterator[None]:
    """Runs the body so that it leaves no logged values, metric states or changed buffers behind."""
    metrics = [m for m in pl_module.modules() if isinstance(m, Metric)]
    states = [m._copy_state_dict() for m in metrics]
    counts = [(m._update_count, m._computed) for m in metrics]
    buffers = [(b, b.detach().clone()) for b in pl_module.buffers()]
    silent = {"log": lambda *_, **__: None, "log_dict": lambda *_, **__: None}
    shadowed = {name: pl_module.__dict__[name] for name in silent if name in pl_module.__dict__}
    pl_module.__dict__.update(silent)
    try:
        yield
    finally:
        for name in silent:
            del pl_module.__dict__[name]
        pl_module.__dict__.update(shadowed)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for metric, state, (count, computed) in zip(metrics, states, counts, strict=True):
            for name, value in state.items():
                setattr(metric, name, value)
            metric._update_count, metric._computed = count, computed
