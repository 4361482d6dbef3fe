"""Which figure of the paper (arXiv 2407.15892) belongs to a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lightning_mst.report.read import Run

__all__ = [
    "CARD", "NUMBERS", "K", "block_gib", "longest", "memory_gib", "over_standard", "tokens_per_second",
]  # fmt: skip

NUMBERS: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("paper_numbers.yaml")))
"""What paper_numbers.yaml says."""
K = 1024
"""Tokens in what the paper calls 1K."""
CARD = "one A100-80GB"
"""What the paper measured on."""

# Our settings (conf/mst) -> the paper's forms.
_FORMS = {
    "off": "standard",
    "recompute": "recompute",
    "no_recompute": "mst_without_recompute",
    "paper": "mst",
    "auto": "mst",
}


def longest(run: Run) -> int | None:
    """The paper's longest sequence, in tokens: plain, with accumulated gradients or with quantized weights."""
    if not _is_alike(run):
        return None
    model, quantization = run.get("model"), run.get("quantization")
    if quantization:
        table = NUMBERS["max_length_k_quantized"].get(quantization, {}) if model == "llama3_8b" else {}
    elif _accumulates(run):
        table = NUMBERS["max_length_k_gradient_accumulation"].get(model, {})
    else:
        table = NUMBERS["max_length_k"].get(model, {})
    figure = table.get(_form(run))
    return None if figure is None else figure * K


def over_standard(run: Run) -> float | None:
    """How many times as long as the standard form's the paper's sequences with mini-sequences are."""
    if not _is_alike(run) or run.get("quantization") or _accumulates(run) or _form(run) != "mst":
        return None
    lengths = NUMBERS["max_length_k"].get(run.get("model"))
    return lengths["mst"] / lengths["standard"] if lengths else NUMBERS["mst_over_standard"].get(run.get("model"))


def memory_gib(run: Run) -> dict[str, float]:
    """Where the paper's memory went at 4,096 tokens, in GiB: kinds and ``"peak"``; empty if it does not say."""
    if not _is_alike(run) or run.get("model") != "llama3_8b" or run.get("sequence_length") != 4096:
        return {}
    form, optimizer = _form(run), run.get("optimizer")
    if optimizer == "adamw_in_backward":
        return NUMBERS["memory_gb_s4096"].get("optimizer_in_backward" if form == "standard" else form, {})
    return NUMBERS["memory_gb_s4096"]["standard"] if form == "standard" and optimizer == "adamw" else {}


def block_gib(run: Run, num_chunks: int | None) -> float | None:
    """The memory of one LM head or MLP on 80,000 tokens, in GiB."""
    if not _is_alike(run) or run.get("model") != "llama3_8b" or run.get("sequence_length") != 80_000:
        return None
    return NUMBERS[f"{run.get('block')}_gb_s80000"].get("standard" if num_chunks is None else num_chunks)


def tokens_per_second(run: Run) -> float | None:
    """The speed of the paper's step at this batch size; at the largest batch, that of the paper's largest."""
    if not run.at_paper_size:
        return None
    length = run.get("sequence_length")
    steps = NUMBERS["seconds_per_step_a100_80gb"].get(run.get("model"), {}).get(length, {}).get(_form(run), {})
    batch = max(steps, default=None) if run.get("batch") == "largest" else run.get("batch_size")
    seconds = steps.get(batch)
    return batch * length / seconds if seconds else None


def _is_alike(run: Run) -> bool:
    return run.at_paper_size and (run.get("batch_size") or 1) == 1


def _accumulates(run: Run) -> bool:
    return (run.get("accumulate_grad_batches") or 1) > 1


def _form(run: Run) -> str | None:
    return _FORMS.get(run.get("mst_name") or "")
