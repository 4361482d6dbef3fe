"""How large the measured blocks and the measured model are."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    """Widths of a block, or of a Llama.

    Attributes:
        hidden: D.
        intermediate: I, inside the MLP.
        vocabulary: V.
        layers: of the whole model.
        head_size: width of an attention head; two query heads share one of keys and values, four from D = 4,096 on.
    """

    hidden: int
    intermediate: int
    vocabulary: int
    layers: int
    head_size: int


# Blocks of a model of medium width, and a whole model that fits into minutes: two cores.
CPU_BLOCKS = Sizes(hidden=1024, intermediate=3584, vocabulary=32000, layers=0, head_size=64)
CPU_STEP = Sizes(hidden=256, intermediate=1024, vocabulary=8192, layers=4, head_size=64)
# Llama-3-8B, the whole model with four of its 32 layers.
GPU = Sizes(hidden=4096, intermediate=14336, vocabulary=128256, layers=4, head_size=128)


def default_sizes(section: str, device: torch.device) -> Sizes:
    """What a section is measured at unless something else is asked for."""
    if device.type == "cuda":
        return GPU
    return CPU_STEP if section in ("step", "layers") else CPU_BLOCKS


def default_lengths(section: str, device: torch.device) -> list[int]:
    """The numbers of tokens; those of a default run on two CPU cores take less than 25 minutes in all."""
    if section == "layers":
        return [32768, 131072, 262144] if device.type == "cuda" else [2048, 8192]
    if device.type == "cuda":
        return [*([2048] if section == "step" else []), 8192, 32768, 65536]
    return {"losses": [1024, 4096], "step": [1024, 4096, 8192]}.get(section, [1024, 4096, 16384])
