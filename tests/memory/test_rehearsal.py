"""A step on fake tensors leaves nothing behind."""

from __future__ import annotations

import resource

import torch
from memory_tools import CONFIGS, adamw, adamw_in_backward, causal_lm, causal_loss, token_batch
from torch._subclasses.fake_tensor import FakeTensor

from lightning_mst.memory.rehearsal import Step, fake_copy, new_fake_mode, rehearse
from lightning_mst.rewrite.handle import apply_mst


def test_a_fake_copy_has_the_models_shapes_ties_and_frozen_weights_and_shares_nothing():
    model = causal_lm(tie_word_embeddings=True)
    model.model.norm.weight.requires_grad_(False)
    fake = new_fake_mode()
    twin = fake_copy(model, fake)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    for own, copied in zip(model.parameters(), twin.parameters(), strict=True):
        assert isinstance(copied, FakeTensor)
        assert (copied.shape, copied.dtype, copied.requires_grad) == (own.shape, own.dtype, own.requires_grad)
    assert not any(isinstance(p, FakeTensor) for p in model.parameters())


def test_steps_can_be_repeated_and_give_the_same():
    fake = new_fake_mode()
    with fake:
        model = causal_lm(num_hidden_layers=2)
    apply_mst(model, CONFIGS["recompute"])
    for strategy, devices, optimizer in (("ddp", 2, adamw_in_backward), ("fsdp2", 2, adamw)):
        step = Step(token_batch(1, 100), causal_loss, optimizer, strategy=strategy, num_devices=devices)
        first, second = rehearse(model, step, fake), rehearse(model, step, fake)
        assert first.peak == second.peak
        assert all(isinstance(p, FakeTensor) and p.grad is None for p in model.parameters())
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert torch.UntypedStorage.resize_.__name__ == "resize_"


def test_kinds_add_up_to_the_total():
    fake = new_fake_mode()
    with fake:
        model = causal_lm()
    held = rehearse(model, Step(token_batch(1, 100), causal_loss, adamw), fake, vocab_size=500)
    for peak in held.peaks.values():
        assert sum(peak.kinds.values()) == peak.total
        assert 0 <= peak.inside <= peak.kinds["activations"]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert next(iter(held.peaks.values())).kinds["weights"] == weights


def test_it_takes_no_memory_however_long_the_sequence():
    fake = new_fake_mode()
    with fake:
        model = causal_lm()
    apply_mst(model, CONFIGS["auto"])
    step = Step(token_batch(1, 2**20), causal_loss, adamw)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert rehearse(model, step, fake).peak > 2**30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024  # KiB; a gigabyte and more if real
