"""What is predicted for each figure of the paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmarks.paper import form, quantized
from benchmarks.paper.form import Form
from benchmarks.paper.stream import RECORDED_LAYERS, Replay
from lightning_mst.configurations import conf_dir
from lightning_mst.memory.devices import DEVICES
from lightning_mst.memory.longest import longest
from lightning_mst.memory.optimizers import make_optimizer
from lightning_mst.memory.planner import RUNGS, mst_setting
from lightning_mst.memory.prediction import Prediction
from lightning_mst.memory.setting import Setting, Training
from lightning_mst.memory.tensor_bytes import TensorBytes
from lightning_mst.report.paper import NUMBERS, K
from lightning_mst.rewrite.config import MSTConfig
from lightning_mst.units import GIB

LENGTH_BOUND, RATIO_BOUND = 0.15, 0.25
"""How far a prediction may be from the paper's figure, as a share of that."""
A100 = int(79.15 * GIB)
"""What torch calls the total capacity of an A100-80GB, in its message about a device that is out of memory."""
CAPACITY = A100 - DEVICES["cuda"].overhead
"""What is left of it for tensors and the allocator's fragments."""

_UNCHANGED = MSTConfig(mlp_chunks=None, lm_head_chunks=None, checkpoint_layers="none")
_SHORTER, _LONGER = 2048, 8192


@dataclass(frozen=True)
class Row:
    """A figure of the paper beside its prediction.

    Attributes:
        name: what it is about.
        paper: the paper's figure: tokens, GiB, or a ratio.
        predicted: for the paper's code.
        bound: how far the two may be apart, as a share of the paper's, if that is checked.
        ours: what a user of this library gets.
        tensors: the prediction without fragmentation, where ``predicted`` has it.
    """

    name: str
    paper: float
    predicted: float
    bound: float | None = None
    ours: str = ""
    tensors: float | None = None

    @property
    def deviation(self) -> float:
        """Of the prediction from the paper's figure, as a share of that."""
        return self.predicted / self.paper - 1

    @property
    def is_within(self) -> bool:
        """Whether the deviation is in bounds."""
        return self.bound is None or abs(self.deviation) <= self.bound


def builder(model: str, num_layers: int | None = None) -> Callable[[], nn.Module]:
    """Builds a model of ``conf/model``, with another number of layers if one is given."""
    config = OmegaConf.load(conf_dir() / "model" / f"{model}.yaml")
    if num_layers is not None:
        config.config.num_hidden_layers = num_layers
    return partial(instantiate, config, _convert_="all")


def setting(model: str, which: Form, *, num_layers: int | None = None, **loss_options: bool) -> Setting:
    """The paper's code on a model, in the script that measures this form; see ``form``."""
    training = Training(
        "bf16-true",
        form.adam_in_backward,
        prepare=form.prepare(which),
        compute_loss=form.Loss(which, **loss_options),
    )
    return Setting(builder(model, num_layers), training)


@cache
def replay(model: str, which: Form, keeps_outputs: bool | None = None) -> Replay:
    """Steps of the paper's code, to be replayed in torch's allocator at any length."""
    options = {} if keeps_outputs is None else {"keeps_outputs": keeps_outputs}
    depth = OmegaConf.load(conf_dir() / "model" / f"{model}.yaml").config.num_hidden_layers
    return Replay(setting(model, which, num_layers=RECORDED_LAYERS, **options), depth, _SHORTER, _LONGER)


@cache
def max_length(model: str, which: Form, keeps_outputs: bool | None = None) -> tuple[int, int]:
    """The longest sequence of the paper's code on one A100: with torch's allocator replayed, and by tensors alone."""
    steps = replay(model, which, keeps_outputs)
    return steps.longest(CAPACITY), steps.longest_without_fragments(CAPACITY)


@cache
def our_lengths(
    model: str,
    *,
    in_backward: bool = True,
    accumulate_grad_batches: int = 1,
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> dict[str, int]:
    """The longest sequences with this library, by setting of ``conf/mst``."""
    training = Training(
        "bf16-true",
        make_optimizer("adamw", in_backward=in_backward),
        prepare=prepare,
        accumulate_grad_batches=accumulate_grad_batches,
    )
    chosen = Setting(builder(model), training)
    lengths: dict[str, int] = {}
    for rung in RUNGS:
        config = mst_setting(rung)
        expected = max(lengths.values(), default=0)
        lengths[rung] = _longest(chosen, config, expected=expected)
    return lengths


def _ours(rungs: Sequence[str], lengths: dict[str, int]) -> str:
    return " / ".join(f"{lengths[rung]:,}" for rung in rungs)


_OURS: dict[str, tuple[str, ...]] = {"standard": ("off",), "recompute": ("recompute",), "mst": ("paper", "auto")}
_NAMES = {
    "llama3_8b": "Llama3-8B",
    "llama2_7b": "Llama2-7B",
    "mistral_7b": "Mistral-7B",
    "qwen2_7b": "Qwen2-7B",
    "gemma2_9b": "Gemma-2-9B",
}


def length_rows() -> list[Row]:
    """The longest sequences of Llama3-8B and Llama2-7B."""
    rows = []
    for model, figures in NUMBERS["max_length_k"].items():
        for which, figure in figures.items():
            predicted, tensors = max_length(model, which)
            ours = _ours(_OURS[which], our_lengths(model))
            rows.append(Row(f"{_NAMES[model]}, {which}", figure * K, predicted, LENGTH_BOUND, ours, tensors))
    return rows


def ratio_rows() -> list[Row]:
    """How many times longer mini-sequences make the sequences of other models."""
    rows = []
    for model, figure in NUMBERS["mst_over_standard"].items():
        (mst, mst_tensors), (standard, standard_tensors) = max_length(model, "mst"), max_length(model, "standard")
        lengths = our_lengths(model)
        ours = " / ".join(f"{lengths[rung] / lengths['off']:.1f}" for rung in _OURS["mst"])
        name = f"{_NAMES[model]}, {mst:,} / {standard:,}"
        rows.append(Row(name, figure, mst / standard, RATIO_BOUND, ours, mst_tensors / standard_tensors))
    return rows


def variant_rows() -> list[Row]:
    """The lengths of the other reading of the scripts: outputs kept where they were dropped, and dropped where kept."""
    rows = []
    for model, figures in NUMBERS["max_length_k"].items():
        for which, keeps in (("standard", True), ("recompute", False)):
            predicted, tensors = max_length(model, which, keeps)
            name = f"{_NAMES[model]}, {which}, outputs {'kept' if keeps else 'dropped'}"
            rows.append(Row(name, figures[which] * K, predicted, tensors=tensors))
    return rows


def accumulation_rows() -> list[Row]:
    """The longest sequences where gradients accumulate, which the optimizer then has to find whole."""
    rows = []
    for model, figures in NUMBERS["max_length_k_gradient_accumulation"].items():
        ours = our_lengths(model, in_backward=False, accumulate_grad_batches=8)
        for which, figure in figures.items():
            training = Training(
                "bf16-true",
                form.adam_at_end,
                prepare=form.prepare(which),
                compute_loss=form.Loss(which, keeps_outputs=False),
                accumulate_grad_batches=8,
            )
            found = _longest(Setting(builder(model), training))
            rows.append(Row(f"{_NAMES[model]}, {which}", figure * K, found, ours=_ours(_OURS[which], ours)))
    return rows


def quantized_rows() -> list[Row]:
    """The longest sequences of Llama3-8B with frozen quantized weights and adapters."""
    rows = []
    for weights, figures in NUMBERS["max_length_k_quantized"].items():
        ours = our_lengths("llama3_8b", in_backward=False, prepare=quantized.prepare(weights))
        for name, figure in figures.items():
            forms: tuple[Form, ...] = ("mst",) if name == "mst" else ("standard", "recompute")
            for which in forms:
                training = Training(
                    "bf16-true",
                    form.adam_in_backward,
                    prepare=quantized.prepare(weights, which),
                    compute_loss=form.Loss(which),
                )
                found = _longest(Setting(builder("llama3_8b"), training))
                rows.append(Row(f"{weights}, {which}", figure * K, found, ours=_ours(_OURS[which], ours)))
    return rows


def _longest(chosen: Setting, config: MSTConfig = _UNCHANGED, *, expected: int = 0) -> int:
    return longest(lambda length: chosen.predict(config, length).total, A100, expected=expected)


def block_rows() -> list[Row]:
    """Bytes of one LM head and of one MLP of Llama3-8B on 80,000 tokens, forward and backward."""
    chosen = setting("llama3_8b", "standard", num_layers=1)
    head, mlp = chosen.model.lm_head.weight, chosen.model.model.layers[0].mlp
    rows = []
    for chunks, figure in NUMBERS["lm_head_gb_s80000"].items():
        run = _head_forward if chunks == "standard" else partial(_head_in_chunks, num_chunks=chunks)
        rows.append(Row(_block_name("LM head", chunks), figure, _bytes_of(chosen.fake, run, head) / GIB))
    for chunks, figure in NUMBERS["mlp_gb_s80000"].items():
        block = mlp if chunks == "standard" else form.ChunkedMLP(mlp, chunks)
        size = _bytes_of(chosen.fake, partial(_mlp, mlp=block), *mlp.parameters())
        rows.append(Row(_block_name("MLP", chunks), figure, size / GIB))
    return rows


def _block_name(block: str, chunks: int | str) -> str:
    return f"{block}, standard" if chunks == "standard" else f"{block}, {chunks} mini-sequences"


def _bytes_of(fake: Any, run: Callable[..., None], *weights: Tensor) -> int:
    held = TensorBytes()
    with fake, held:
        held.count(weights, "weights")
        hidden = torch.empty(1, 80_000, 4096, dtype=torch.bfloat16, requires_grad=True)
        run(hidden, *weights)
        peak = held.peak
        held.freeze()
    for weight in weights:
        weight.grad = None
    return peak


def _head_forward(hidden: Tensor, weight: Tensor) -> None:
    F.linear(hidden, weight).float()


def _head_in_chunks(hidden: Tensor, weight: Tensor, num_chunks: int) -> None:
    labels = torch.zeros(hidden.shape[1], dtype=torch.int64)
    form.HeadInChunks.apply(hidden.flatten(0, 1), weight, labels, num_chunks).backward()


def _mlp(hidden: Tensor, *_: Tensor, mlp: nn.Module) -> None:
    out = mlp(hidden)
    out.backward(torch.empty_like(out))


def breakdown_rows() -> list[Row]:
    """Where the memory of Llama3-8B goes at S = 4,096."""
    rows = []
    for name, figures in NUMBERS["memory_gb_s4096"].items():
        which: Form = name if name in ("recompute", "mst") else "standard"
        chosen = setting("llama3_8b", which)
        if name == "standard":
            loss = form.Loss(which, zeroes_gradients=True)
            chosen.training = replace(chosen.training, make_optimizer=form.adam_at_end, compute_loss=loss)
        found = chosen.predict(_UNCHANGED, 4096)
        for part, figure in figures.items():
            rows.append(Row(f"{name}: {part.replace('_', ' ')}", figure, _part(found, part) / GIB))
    return rows


def _part(found: Prediction, part: str) -> int:
    kinds = found.kinds
    if part == "peak":
        return found.tensors
    if part == "activations":
        return found.tensors - kinds["weights"] - kinds["optimizer_states"]
    return kinds[part]


SECTIONS: dict[str, Callable[[], list[Row]]] = {
    "lengths": length_rows,
    "ratios": ratio_rows,
    "variants": variant_rows,
    "accumulation": accumulation_rows,
    "quantized": quantized_rows,
    "blocks": block_rows,
    "breakdown": breakdown_rows,
}
"""By the name of its table."""
