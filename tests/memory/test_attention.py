"""Attention takes what a flash kernel takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from memory_tools import causal_lm, causal_loss, token_batch
from torch import nn

from lightning_mst.memory.attention import FlashAttention
from lightning_mst.memory.rehearsal import Step, new_fake_mode, rehearse
from lightning_mst.memory.tensor_bytes import TensorBytes

HEADS, KEYS, LENGTH, WIDTH = 4, 2, 512, 16


def bytes_of(workspace: bool) -> tuple[int, int]:
    """What is kept for the backward pass, and the peak."""
    with new_fake_mode():
        q = torch.empty(1, HEADS, LENGTH, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.empty(1, KEYS, LENGTH, WIDTH, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        with FlashAttention(kernel_workspace=workspace).used_by(nn.Module()), TensorBytes([q, k, v]) as held:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            kept = held.live
            out.backward(torch.empty_like(out))
        return kept, held.peak


def test_it_keeps_output_and_log_sum_exp():
    kept, _ = bytes_of(workspace=False)
    assert kept == 2 * HEADS * LENGTH * WIDTH + 4 * HEADS * LENGTH


def test_a_gpus_kernel_takes_an_fp32_sum_for_queries_and_whole_gradients_for_grouped_keys():
    numbers = HEADS * LENGTH * WIDTH
    extra = bytes_of(workspace=True)[1] - bytes_of(workspace=False)[1]
    # A CPU's gradients lie otherwise in memory than the inputs, so that autograd copies one of them here.
    assert 4 * numbers + 2 * 2 * numbers <= extra + 2 * numbers


@pytest.mark.parametrize("transposed", [False, True])
def test_the_output_lies_in_memory_as_the_queries_do_like_that_of_torchs_kernel(transposed):
    shape = (1, LENGTH, HEADS, WIDTH) if transposed else (1, HEADS, LENGTH, WIDTH)
    q = torch.randn(shape)
    q = q.transpose(1, 2) if transposed else q
    with FlashAttention(kernel_workspace=False).used_by(nn.Module()):
        modelled = F.scaled_dot_product_attention(q, q, q)
    assert modelled.stride() == F.scaled_dot_product_attention(q, q, q).stride()


@pytest.mark.parametrize(
    ("family", "options"),
    [("Mistral", {"sliding_window": 64}), ("Gemma2", {"head_dim": 16, "attn_implementation": "eager"})],
)
def test_soft_caps_and_sliding_windows_are_linear_in_the_length_too(family, options):
    def peak(length: int) -> int:
        fake = new_fake_mode()
        with fake:
            model = causal_lm(family, **options)
        return rehearse(model, Step(token_batch(1, length), causal_loss, lambda _: None), fake).peak

    first, second, third = peak(2048), peak(4096), peak(8192)
    assert third - second == pytest.approx(2 * (second - first), rel=0.01)
