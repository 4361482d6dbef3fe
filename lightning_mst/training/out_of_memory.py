"""What to do when memory runs out in a training step: say where and what to try, or try it."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_mst.rewrite.handle import MSTHandle, Row
from lightning_mst.training.optimizers import free_gradients_in_backward
from lightning_mst.training.ranks import any_rank
from lightning_mst.training.side_effects import Snapshot, without_side_effects
from lightning_mst.training.token_weights import TokenWeights
from lightning_mst.training.wrapping import wrapped

__all__ = ["RetryOutOfMemory", "explain", "is_out_of_memory"]

_log = logging.getLogger(__name__)

_LARGEST_FACTOR = 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's or the host's memory did not suffice."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's CPU allocator


def explain(error: BaseException, handle: MSTHandle) -> str:
    """Which block ran out of memory, what its settings are, and what to set next.

    Args:
        error: as it was caught, with its traceback.
        handle: of the rewritten model.
    """
    config, factor = handle.config, handle.pace.factor
    assert config is not None
    settings = f"mlp_chunks={config.mlp_chunks}, lm_head_chunks={config.lm_head_chunks}"
    if factor > 1:
        settings += f", both times {factor}"
    row = _row_of(error.__traceback__, handle)
    where = f"in {row.name} ({row.block})" if row else "outside the blocks that run in mini-sequences"
    if row and row.block in ("MLP", "LM head") and row.rewritten:
        option = "mlp_chunks" if row.block == "MLP" else "lm_head_chunks"
        now = getattr(config, option)
        if isinstance(now, int):
            advice = f"{option}={2 * now * factor}"
        else:
            advice = f"a number of mini-sequences, such as {option}={64 * factor},"
        advice += " or MSTCallback(on_oom='retry'), which doubles it by itself"
    elif config.mlp_chunks is None or config.lm_head_chunks is None:
        advice = f"{'mlp_chunks' if config.mlp_chunks is None else 'lm_head_chunks'}='auto' in place of None"
    elif config.checkpoint_layers != "all" and handle.layers:
        advice = f"checkpoint_layers='all' in place of {config.checkpoint_layers!r}"
    elif config.layer_chunks is None and handle.layers:
        advice = "layer_chunks='auto', which runs the rest of each layer in mini-sequences, too"
    elif config.checkpoint_offload is None and handle.layers:
        advice = "checkpoint_offload='inputs', which keeps the layers' inputs in the host's memory"
    else:
        advice = (
            "shorter sequences or a smaller batch; for weights, gradients and optimizer states, a sharding strategy"
            " (mst_model_parallel), OptimizerInBackward, OptimizerOnHost or bf16-true"
        )
    return (
        f"Memory ran out {where}, with {settings}, checkpoint_layers={config.checkpoint_layers!r}. Next, try {advice}."
    )


def _row_of(traceback: TracebackType | None, handle: MSTHandle) -> Row | None:
    """The block in which an error was raised: the innermost to which a frame belongs, or whose weights it used."""
    names: dict[int, str] = {id(module): name for name, module in handle.model.named_modules()}
    of_weights = {id(p): name.rpartition(".")[0] for name, p in handle.model.named_parameters()}
    found: Row | None = None
    while traceback is not None:
        entries = traceback.tb_frame.f_locals
        owner = entries.get("self")
        weights = getattr(owner, "weights", ()) if not isinstance(owner, nn.Module) else ()
        name = names.get(id(owner)) or next((of_weights[id(w)] for w in weights if id(w) in of_weights), None)
        # Frames come outermost first: a layer's frame is followed by that of its MLP.
        found = _block(name, handle) or found if name else found
        traceback = traceback.tb_next
    return found


def _block(name: str, handle: MSTHandle) -> Row | None:
    holders = [row for row in handle.rows if row.name and f"{name}.".startswith(f"{row.name}.")]
    return max(holders, key=lambda row: len(row.name), default=None)


class HasHandle(Protocol):
    """Whoever rewrites the model."""

    handle: MSTHandle | None


class RetryOutOfMemory(Callback):
    """Doubles the numbers of mini-sequences and repeats the step when memory runs out, on every rank alike.

    1. Every micro-batch of a step is remembered until the step is done (its inputs only).
    2. When memory runs out in a forward pass, it is run again. In a backward pass, the gradients of the step are
       dropped and all of its micro-batches so far run again: part of this one's may have been added already.
    3. Under DDP the ranks agree after every forward and backward pass whether one of them ran out, so gradients are
       reduced after the backward pass, not during it: exact, but without overlap.

    What a repeated training step logs, and what it adds to metrics, counts once.

    Args:
        owner: has the ``handle`` of the rewritten model, once there is one.
        weights: by which losses are weighted, if they are.
    """

    def __init__(self, owner: HasHandle, weights: TokenWeights | None) -> None:
        self._owner = owner
        self._weights = weights
        self._run_training_step: Callable[..., Any] | None = None
        self._step: list[tuple[tuple[Any, ...], Tensor | None]] = []
        self._undo: ExitStack | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        strategy = trainer.strategy
        if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise MisconfigurationException(
                f"on_oom='retry' can't repeat a step under {type(strategy).__name__}: a rank that runs out of memory"
                " leaves the others waiting in the middle of gathering weights. Use on_oom='raise' there, and set"
                " mlp_chunks and lm_head_chunks."
            )
        if getattr(strategy, "_ddp_kwargs", {}).get("static_graph"):
            raise MisconfigurationException(
                "on_oom='retry' does not go with DDP's static_graph=True. Drop one of them."
            )
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "on_oom='retry' repeats the training step, which manual optimization turns into two steps. Use"
                " on_oom='raise'."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if names := free_gradients_in_backward(trainer):
            raise MisconfigurationException(
                f"on_oom='retry' can't repeat a step half of whose gradients {names[0]} has taken already. Use"
                " on_oom='raise'."
            )
        # After every other callback's setup, so that what they do to a backward pass is repeated, too.
        self._undo = ExitStack()
        self._run_training_step = self._undo.enter_context(
            wrapped(trainer.strategy, "training_step", partial(self._training_step, trainer))
        )
        self._undo.enter_context(wrapped(trainer.strategy, "backward", partial(self._backward, trainer)))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        if self._undo is not None:
            self._undo.close()
        self._undo, self._step = None, []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._step = []

    def _training_step(self, trainer: Trainer, training_step: Callable[..., Any], *args: Any) -> Any:
        self._step.append((args, self._weights.weight if self._weights is not None else None))
        before = Snapshot(trainer.lightning_module)
        with _without_reduction(trainer):
            return self._repeated(trainer, lambda: training_step(*args), before.restore)

    def _backward(
        self, trainer: Trainer, backward: Callable[..., Tensor], loss: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        training_step = self._run_training_step
        assert training_step is not None
        attempts = 0

        def run() -> Tensor:
            nonlocal attempts
            attempts += 1
            if attempts == 1:
                return backward(loss, *args, **kwargs)
            for parameter in trainer.lightning_module.parameters():
                parameter.grad = None
            result = loss
            for step_args, weight in self._step:
                if self._weights is not None:
                    self._weights.weight = weight
                with without_side_effects(trainer.lightning_module):
                    output = training_step(*step_args)
                again = output["loss"] if isinstance(output, Mapping) else output
                result = backward(again / trainer.accumulate_grad_batches, *args, **kwargs)
            return result

        with _without_reduction(trainer) as reduce:
            # The loop around the training step still holds this loss, which would keep its graph in memory.
            result = self._repeated(trainer, run, loss.detach_)
        reduce()
        return result

    def _repeated(self, trainer: Trainer, run: Callable[[], Any], undo: Callable[[], object]) -> Any:
        """Runs a pass until memory suffices on every rank.

        Args:
            trainer: the Trainer.
            run: the pass.
            undo: called before the pass is repeated.
        """
        handle = self._owner.handle
        assert handle is not None
        while True:
            error, result = None, None
            try:
                result = run()
            except (RuntimeError, MemoryError) as caught:
                if not is_out_of_memory(caught):
                    raise
                error = caught
            if not any_rank(trainer.strategy, error is not None):
                return result
            if handle.pace.factor >= _LARGEST_FACTOR:
                raise error or torch.OutOfMemoryError("Another rank ran out of memory, whatever was tried.")
            reason = explain(error, handle) if error else "Memory ran out on another rank."
            # Without these, what the pass had computed would stay in memory: a traceback holds all variables.
            error = result = None
            undo()
            if isinstance(trainer.strategy.model, DistributedDataParallel):
                # DDP sends buffers around before a forward pass, and notes so after it: not all ranks got there.
                trainer.strategy.model.require_forward_param_sync = False
            handle.pace.factor *= 2
            _log.warning(
                "%s Now the step is repeated with %d times as many mini-sequences as these settings say.",
                reason,
                handle.pace.factor,
            )
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


@contextmanager
def _without_reduction(trainer: Trainer) -> Iterator[Callable[[], None]]:
    """Runs the body without DDP's reduction of gradients, and yields a function that does it later, if it is due."""
    model = trainer.strategy.model
    if not isinstance(model, DistributedDataParallel) or not model.require_backward_grad_sync:
        yield lambda: None
        return
    with model.no_sync():
        yield partial(_reduce, model)


def _reduce(model: DistributedDataParallel) -> None:
    """Lets DDP reduce the gradients that are there, by a backward pass that adds zeros to them."""

    def zero(_: Callable[..., Any]) -> Tensor:
        every = not model.find_unused_parameters
        used = [p for p in model.module.parameters() if p.requires_grad and (every or p.grad is not None)]
        return torch.stack([p.sum().float() * 0 for p in used]).sum()

    with wrapped(model.module, "forward", zero):
        loss = model()
    loss.backward()
