"""``MSTCallback``: mini-sequences for any Lightning program, by one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mst.memory.log import MemoryLog
from lightning_mst.ops.chunking import Chunks
from lightning_mst.rewrite.config import MSTConfig
from lightning_mst.rewrite.handle import MSTHandle, apply_mst
from lightning_mst.rewrite.verify import verify
from lightning_mst.rewrite.zero3 import gather_whole_blocks
from lightning_mst.training.auto_layers import check_auto_layers, settle_layers
from lightning_mst.training.checks import check_model, check_trainer
from lightning_mst.training.memory_monitor import MemoryMonitor
from lightning_mst.training.one_step import loss_of_training_step
from lightning_mst.training.optimizers import connect_optimizers, release_optimizers
from lightning_mst.training.out_of_memory import RetryOutOfMemory, explain, is_out_of_memory
from lightning_mst.training.predicted import HALF_PRECISION
from lightning_mst.training.ranks import agree_on_longest, check_same_settings, num_replicas
from lightning_mst.training.sharding import shard_fsdp1
from lightning_mst.training.side_effects import without_side_effects
from lightning_mst.training.timeline import check_matplotlib
from lightning_mst.training.token_weights import TokenWeights, count_labels
from lightning_mst.training.wrapping import wrapped


class MSTCallback(Callback):
    """Runs a LightningModule's MLPs and LM head over mini-sequences, in fit, validate, test and predict.

    The rewrite happens after ``configure_model``, so lazily built and sharded models are covered, and is taken back at
    the end and after an exception. With everything switched off (``mlp_chunks=None, lm_head_chunks=None,
    checkpoint_layers="none"``) the callback only logs memory, as for a baseline.

    Args:
        mlp_chunks: as in ``MSTConfig``.
        lm_head_chunks: as in ``MSTConfig``.
        checkpoint_layers: as in ``MSTConfig``.
        layer_chunks: as in ``MSTConfig``.
        checkpoint_offload: as in ``MSTConfig``.
        offload_fraction: as in ``MSTConfig``.
        mlp_modules: as in ``MSTConfig``.
        lm_head_module: as in ``MSTConfig``.
        log_memory: log every training step's peak memory as ``peak_memory_gib`` (GiB) to the loggers and the progress
            bar, and the peaks of its phases as ``peak_memory_forward_gib``, ``peak_memory_backward_gib`` and
            ``peak_memory_optimizer_gib`` to the loggers. ``True`` takes the allocator's peak on an accelerator and the
            process's peak resident size on a CPU; ``"tensors"`` counts the exact bytes of tensors on any device, which
            takes time at every operator. On an accelerator ``allocated_memory_gib`` and ``reserved_memory_gib`` come
            with both. With several ranks, each number is that of the fullest. Where a step's peak occurred stands in
            ``memory``. Bytes of tensors (an accelerator's, or ``"tensors"``) are compared with a prediction at the
            beginning, and a difference of more than 10 % is warned about.
        memory_timeline: draw the memory of one training step, the second, coloured by block, beside the modelled one of
            the standard form: ``memory_timeline.png`` in the Trainer's ``default_root_dir``, with its data in
            ``memory_timeline.json``, and on CUDA torch's ``memory_snapshot.pickle``. Needs matplotlib.
        device_memory: as in ``MSTConfig``.
        sequence_length: as in ``MSTConfig``.
        batch_size: as in ``MSTConfig``.
        verify: before the first training step, compute one batch's loss and gradients with and without mini-sequences
            and stop if they differ. One step of the unmodified model must fit in memory.
        token_weighted: weight losses so that a step over several ranks and accumulated batches is that of one big
            batch. ``True`` counts ``batch["labels"]``; a function of the batch counts what the loss is the mean of.
        on_oom: when memory runs out: ``"raise"`` an error that says where and what to try next, or ``"retry"`` the step
            with twice as many mini-sequences (on one device and under DDP, where gradients are then reduced after the
            backward pass).

    Raises:
        ValueError: at once, for a wrong value; at setup, if there is nothing to rewrite.
        MisconfigurationException: at setup, or before the first step, for what does not go together.
        VerificationError: before the first step, if ``verify`` finds a difference.

    Attributes:
        handle: the ``MSTHandle`` of the rewritten model while a Trainer runs, else ``None``.
        memory: a ``MemoryLog`` of this rank: the last and the highest step, their peaks by place, and the prediction.

    Example:
        >>> trainer = Trainer(callbacks=[MSTCallback()])
    """

    def __init__(
        self,
        mlp_chunks: Chunks = "auto",
        lm_head_chunks: Chunks = "auto",
        checkpoint_layers: Literal["all", "none", "auto"] | int | Sequence[int] = "all",
        mlp_modules: str | Sequence[str] | None = None,
        lm_head_module: str | None = None,
        log_memory: bool | Literal["tensors"] = True,
        verify: bool = False,
        token_weighted: bool | Callable[[Any], Tensor | int] = False,
        on_oom: Literal["raise", "retry"] = "raise",
        memory_timeline: bool = False,
        device_memory: str | int | None = None,
        sequence_length: int | None = None,
        batch_size: int = 1,
        layer_chunks: Chunks = None,
        checkpoint_offload: Literal["inputs", "inputs+attention"] | None = None,
        offload_fraction: float | Literal["auto"] = 0.0,
    ) -> None:
        if log_memory not in (True, False, "tensors"):
            raise ValueError(f"log_memory={log_memory!r} is not a choice. Expected True, False or 'tensors'.")
        if on_oom not in ("raise", "retry"):
            raise ValueError(f"on_oom={on_oom!r} is not a choice. Expected 'raise' or 'retry'.")
        self.config = MSTConfig(
            mlp_chunks=mlp_chunks,
            lm_head_chunks=lm_head_chunks,
            checkpoint_layers=checkpoint_layers,
            layer_chunks=layer_chunks,
            checkpoint_offload=checkpoint_offload,
            offload_fraction=offload_fraction,
            mlp_modules=mlp_modules,
            lm_head_module=lm_head_module,
            device_memory=device_memory,
            sequence_length=sequence_length,
            batch_size=batch_size,
        )
        self.log_memory = log_memory
        self.verify = verify
        self.token_weighted = token_weighted
        self.on_oom = on_oom
        self.memory_timeline = memory_timeline
        self.handle: MSTHandle | None = None
        self.memory = MemoryLog()
        self._monitor: MemoryMonitor | None = None
        self._printed = False
        self._first_batch = True
        self._helpers: list[Callback] = []
        self._undo: ExitStack | None = None

    @classmethod
    def of_config(cls, config: MSTConfig) -> MSTCallback:
        """A callback with these settings and otherwise the defaults."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(config)})

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_trainer(trainer, self.config)
        if stage == "fit":
            check_auto_layers(trainer, self.config)
        if self.verify and stage == "fit":
            _check_can_verify(trainer, pl_module)
        if self.memory_timeline and stage == "fit":
            check_matplotlib()
        check_same_settings(self.config)
        self._first_batch = True
        self._helpers = self._make_helpers(trainer)
        for helper in self._helpers:
            helper.setup(trainer, pl_module, stage)

        # Called after configure_model, which may only now build or shard the model.
        def rewrite_first(strategy_setup: Callable[[Trainer], None], trainer: Trainer) -> None:
            self.handle = self._apply(trainer, pl_module)
            strategy = trainer.strategy
            if isinstance(strategy, FSDPStrategy):
                with wrapped(strategy, "_setup_model", partial(shard_fsdp1, strategy, self.handle)):
                    strategy_setup(trainer)
            else:
                strategy_setup(trainer)
            if isinstance(strategy, DeepSpeedStrategy):
                # Only now: it changes what DeepSpeed's engine has just put on the modules.
                gather_whole_blocks(self.handle)

        self._undo = ExitStack()
        self._undo.enter_context(wrapped(trainer.strategy, "setup", rewrite_first))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        connect_optimizers(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before the helpers, which may repeat what is measured.
        self.memory = MemoryLog()
        if (self.log_memory or self.memory_timeline) and self.handle is not None:
            self._monitor = MemoryMonitor(
                trainer, pl_module, self.handle, log_memory=self.log_memory, memory_timeline=self.memory_timeline
            )
            self.memory = self._monitor.log
        for helper in self._helpers:
            helper.on_train_start(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for helper in reversed(self._helpers):
            helper.on_train_end(trainer, pl_module)
        if self._monitor is not None:
            self._monitor.draw()
        self._stop_measuring()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for helper in reversed(self._helpers):
            helper.teardown(trainer, pl_module, stage)
        self._end(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown then.
        if self.handle is not None and is_out_of_memory(exception):
            exception.args = (f"{exception}\n{explain(exception, self.handle)}",)
        for helper in reversed(self._helpers):
            helper.on_exception(trainer, pl_module, exception)
        self._end(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # A rule makes a number of mini-sequences of the length, which may differ between ranks.
        if self.handle is not None and self.handle.pace.shared and isinstance(self.config.mlp_chunks, str):
            self.handle.pace.longest, self.handle.pace.own = agree_on_longest(trainer.strategy, batch)
        for helper in self._helpers:
            helper.on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._first_batch:
            self._first_batch = False
            self._warn_if_eval_mode(pl_module)
            if self.handle is not None and self.config.checkpoint_layers == "auto":
                settle_layers(trainer, pl_module, self.handle, self.config, batch, batch_idx)
            if self.verify:
                self._verify(trainer, pl_module, batch, batch_idx)
        if self._monitor is not None:
            self._monitor.begin(batch, batch_idx)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._monitor is not None:
            self._monitor.meter.before_backward()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._monitor is not None:
            self._monitor.meter.after_backward()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for helper in self._helpers:
            helper.on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._monitor is not None:
            self._monitor.meter.before_optimizer_step()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.handle is not None:
            self.handle.pace.longest = self.handle.pace.own = 1
        if self._monitor is not None:
            self._monitor.end(batch, batch_idx)

    def _stop_measuring(self) -> None:
        if self._monitor is not None:
            self._monitor.stop()
        self._monitor = None

    def _make_helpers(self, trainer: Trainer) -> list[Callback]:
        helpers: list[Callback] = []
        # The model's own count goes first: a loss is weighted once.
        weights = next((callback for callback in trainer.callbacks if isinstance(callback, TokenWeights)), None)
        if weights is None and self.token_weighted:
            weights = TokenWeights(count_labels if self.token_weighted is True else self.token_weighted)
            helpers.append(weights)
        if self.on_oom == "retry":
            helpers.append(RetryOutOfMemory(self, weights))
        return helpers

    def _apply(self, trainer: Trainer, pl_module: LightningModule) -> MSTHandle:
        config = self.config
        if config.checkpoint_layers == "auto":
            # Until the first batch tells how many layers are enough.
            config = replace(config, checkpoint_layers="all", device_memory=None, sequence_length=None, batch_size=1)
        check_model(pl_module, config)
        handle = apply_mst(pl_module, config)
        handle.pace.shared = num_replicas(trainer) > 1
        if not self._printed and trainer.is_global_zero and not self.config.asks_for_nothing:
            handle.print()
        self._printed = True
        return handle

    def _end(self, trainer: Trainer) -> None:
        release_optimizers(trainer)
        self._stop_measuring()
        if self._undo is not None:
            self._undo.close()
        if self.handle is not None:
            self.handle.remove()
        self.handle, self._undo, self._helpers = None, None, []

    def _warn_if_eval_mode(self, pl_module: LightningModule) -> None:
        if self.handle is None:
            return
        rows = [row for row in self.handle.rows if row.rewritten]
        asleep = [row for row in rows if not pl_module.get_submodule(row.name).training]
        if asleep:
            checkpointed = any(row.form.startswith("checkpointed") for row in asleep)
            rank_zero_warn(
                f"{len(asleep)} of the {len(rows)} rewritten modules (such as {asleep[0].name}) are in evaluation mode "
                "during training, as Hugging Face's from_pretrained leaves a model and Lightning keeps it: dropout is "
                "off" + (", and so is activation checkpointing" if checkpointed else "") + ". Call model.train() once "
                "after loading it."
            )

    def _verify(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self.handle is not None

        def compute_loss() -> Tensor:
            with trainer.precision_plugin.train_step_context():
                return loss_of_training_step(pl_module, batch, batch_idx, wanted_by="verify=True")

        with without_side_effects(pl_module):
            result = verify(self.handle, compute_loss, dtype=HALF_PRECISION.get(trainer.precision))
        rank_zero_info(
            f"MSTCallback verified the first batch: the loss differs by {result.loss_difference:.2g} from the "
            f"unmodified model's, gradients by at most {result.gradient_difference:.2g} of their norm "
            f"({result.worst_parameter})"
            + (", in evaluation mode because the model uses dropout." if result.in_eval_mode else ".")
        )


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
