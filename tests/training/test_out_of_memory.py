"""Memory that runs out in a training step: what is said, and what is tried."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_mst import MSTCallback, OptimizerInBackward
from lightning_mst.causal_lm import CausalLM
from lightning_mst.training.out_of_memory import is_out_of_memory

VOCAB, LENGTH = 61, 24


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.2, **sizes)).double().train()


class Limit(nn.Module):
    """An activation function for which there is memory for so many tokens only."""

    def __init__(self, function: nn.Module, tokens: int, *, backward: bool) -> None:
        super().__init__()
        self.function, self.tokens, self.backward = function, tokens, backward

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[-2] > self.tokens and x.requires_grad == self.backward:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.function(x)


class Seen(CausalLM):
    """Notes the batches that it was trained on, and counts them in a metric."""

    def __init__(self, *, tokens: int | None = None, backward: bool = False, **options: Any) -> None:
        options.setdefault("optimizer", lambda parameters: torch.optim.SGD(parameters, lr=0.5))
        super().__init__(build(), **options)
        self.seen: list[int] = []
        self.counted = MeanMetric()
        if tokens is not None:
            mlp = self.model.model.layers[1].mlp
            mlp.act_fn = Limit(mlp.act_fn, tokens, backward=backward)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.counted.update(float(batch_idx))
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.seen.append(batch_idx)
        self.last_loss = float(outputs["loss"])


def fit(module: LightningModule, callback: MSTCallback, **options: Any) -> Trainer:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(VOCAB, (LENGTH,), generator=generator) for _ in range(6)]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=1))
    return trainer


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_is_repeated_with_more_mini_sequences_and_no_batch_is_lost(backward: bool, accumulate: int) -> None:
    limited, free = Seen(tokens=4, backward=backward), Seen()
    callback = MSTCallback(mlp_chunks=2, lm_head_chunks=2, on_oom="retry")
    trainer = fit(limited, callback, accumulate_grad_batches=accumulate)
    fit(free, MSTCallback(mlp_chunks=2, lm_head_chunks=2), accumulate_grad_batches=accumulate)
    assert limited.seen == free.seen == list(range(6))
    assert limited.counted.compute() == free.counted.compute()
    assert trainer.global_step == 6 // accumulate
    assert limited.last_loss == pytest.approx(free.last_loss, rel=1e-6)
    for got, wanted in zip(limited.parameters(), free.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


def test_losses_weighted_by_tokens_stay_so_when_repeated() -> None:
    results = []
    for tokens in (4, None):
        module = Seen(tokens=tokens, backward=True, token_weighted=True)
        fit(module, MSTCallback(mlp_chunks=2, lm_head_chunks=2, on_oom="retry"), accumulate_grad_batches=3)
        results.append(list(module.parameters()))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_message_names_the_block_and_the_next_setting(backward: bool) -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fit(Seen(tokens=4, backward=backward), MSTCallback(mlp_chunks=2, lm_head_chunks="auto"))
    message = str(caught.value)
    assert "Tried to allocate 2.00 GiB" in message
    assert "Memory ran out in model.model.layers.1.mlp (MLP), with mlp_chunks=2, lm_head_chunks=auto" in message
    assert "Next, try mlp_chunks=4 or MSTCallback(on_oom='retry')" in message


def test_the_message_of_a_rule_asks_for_a_number() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="try a number of mini-sequences, such as mlp_chunks=64"):
        fit(Seen(tokens=4, backward=True), MSTCallback(mlp_chunks="auto"))


def test_outside_the_blocks_the_message_asks_for_what_is_switched_off() -> None:
    module = Seen()

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    module.model.model.rotary_emb.register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match=r"outside the blocks .* try mlp_chunks='auto' in place of None"):
        fit(module, MSTCallback(mlp_chunks=None))
    with pytest.raises(torch.OutOfMemoryError, match=r"outside the blocks .* try checkpoint_layers='all'"):
        fit(module, MSTCallback(checkpoint_layers="none"))
    with pytest.raises(torch.OutOfMemoryError, match=r"outside the blocks .* try layer_chunks='auto', which"):
        fit(module, MSTCallback())
    with pytest.raises(torch.OutOfMemoryError, match=r"outside the blocks .* try checkpoint_offload='inputs', which"):
        fit(module, MSTCallback(layer_chunks="auto"))
    with pytest.raises(torch.OutOfMemoryError, match=r"outside the blocks .* try shorter sequences"):
        fit(module, MSTCallback(layer_chunks="auto", checkpoint_offload="inputs"))


def test_what_can_not_be_mended_by_more_mini_sequences_ends_with_the_error() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="both times 1024"):
        fit(Seen(tokens=0), MSTCallback(mlp_chunks=2, on_oom="retry"))


def test_other_errors_are_not_repeated() -> None:
    module = Seen()
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        raise RuntimeError("shapes do not match")

    module.model.model.rotary_emb.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match=r"shapes do not match$"):
        fit(module, MSTCallback(on_oom="retry"))
    assert len(calls) == 1


def test_torchs_cpu_allocator_runs_out_of_memory_too() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_a_step_that_is_half_taken_can_not_be_repeated() -> None:
    module = Seen(optimizer=lambda parameters: OptimizerInBackward(parameters, torch.optim.SGD, lr=0.1))
    with pytest.raises(MisconfigurationException, match="OptimizerInBackward has taken already"):
        fit(module, MSTCallback(on_oom="retry"))
