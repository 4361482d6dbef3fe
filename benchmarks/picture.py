"""The README's picture: what mini-sequences do, and what that saves: ``python -m benchmarks.picture [--measure]``.

With ``--measure`` the bytes are measured again (one training step of the small Llama per point) and written to
``benchmarks/results/memory-cpu.json``; without, the picture is drawn from that file.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

import torch
import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lightning_mst import apply_mst
from lightning_mst.memory import TensorBytes

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "memory-cpu.json"
PICTURE = ROOT / "docs" / "picture.png"
OFF = {"mlp_chunks": None, "lm_head_chunks": None, "checkpoint_layers": "none"}
SETTINGS = {
    "standard": OFF,
    "activation recomputation": {**OFF, "checkpoint_layers": "all"},
    "mini-sequences": {},
}
COLORS = {"standard": "#9aa5b1", "activation recomputation": "#d9822b", "mini-sequences": "#2f6db3"}
INK = "#1f2933"
VOCAB = 8192


def measure(lengths: list[int]) -> dict:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=131072,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    peaks: dict[str, list[int]] = {}
    for name, options in SETTINGS.items():
        handle = apply_mst(model, **options)
        for length in lengths:
            ids = torch.randint(0, VOCAB, (1, length))
            model.zero_grad(set_to_none=True)
            with TensorBytes([*model.parameters(), *model.buffers(), ids]) as tracker:
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            peaks.setdefault(name, []).append(tracker.peak)
            print(f"{name:26} S={length:6} {tracker.peak / 2**30:.3f} GiB")
        handle.remove()
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "what": "peak bytes of tensors beyond weights and input, one training step, Llama of 4 layers, fp32",
        "lengths": lengths,
        "peak_bytes": peaks,
    }


def block(axes: Axes, title: str, chunks: int) -> None:
    """A sequence, its intermediates, its output; one mini-sequence at a time."""
    height = 6.0
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    for x, width, label in ((0.0, 1.0, "in\nS x D"), (2.0, 4.5, "MLP or LM head"), (7.5, 1.0, "out\nS x D")):
        for chunk in range(chunks):
            low = height - (chunk + 1) * height / chunks
            inner = width > 1
            gone = inner and chunk > 0
            axes.add_patch(
                Rectangle(
                    (x, low + 0.04), width, height / chunks - 0.08,
                    facecolor="none" if gone else (COLORS["mini-sequences"] if chunks > 1 else COLORS["standard"]),
                    edgecolor=COLORS["standard"], linestyle=":" if gone else "-", alpha=0.85 if inner else 0.45,
                )
            )  # fmt: skip
        axes.text(x + width / 2, -0.35, label, ha="center", va="top", fontsize=8, color=INK)
    note = "all intermediates at once" if chunks == 1 else "one chunk at a time"
    axes.text(4.25, height - height / chunks / 2, note, ha="center", va="center", fontsize=8, color="white")
    axes.set(xlim=(-0.4, 9), ylim=(-1.8, height + 0.2))
    axes.axis("off")


def draw(result: dict) -> None:
    figure = Figure(figsize=(11, 3.4), dpi=150, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
    block(left, "Standard", 1)
    block(middle, "Mini-sequences (here M = 6)", 6)
    lengths = [n / 1024 for n in result["lengths"]]
    for name, peaks in result["peak_bytes"].items():
        values = [p / 2**30 for p in peaks]
        right.plot(lengths, values, marker="o", markersize=4, color=COLORS[name], label=name)
        right.annotate(
            f"{values[-1]:.2f}", (lengths[-1], values[-1]), xytext=(5, 0), textcoords="offset points", fontsize=8,
            va="center", color=INK,
        )  # fmt: skip
    right.set_title("Peak GiB of one training step, beyond the weights", fontsize=10, loc="left", color=INK)
    right.set_xlabel("sequence length (K tokens)", fontsize=9, color=INK)
    right.set_xlim(0, lengths[-1] * 1.1)
    right.set_ylim(0)
    right.spines[["top", "right"]].set_visible(False)
    right.tick_params(labelsize=8, colors=INK)
    right.legend(frameon=False, fontsize=9)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure again first")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    arguments = parser.parse_args()
    if arguments.measure:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(measure(arguments.lengths), indent=1) + "\n")
    draw(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
