"""What a module is made of: linear layers, projections that mirror each other, experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

from lightning_mst.rewrite.shapes import linear_shape, true_shape


def linear_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The linear layers below a module; what a linear layer is made of itself (an adapter's matrices) is not one."""
    for child in module.children():
        if linear_shape(child) is not None:
            yield child
        else:
            yield from linear_layers(child)


def mirrored_widths(module: nn.Module) -> list[int]:
    """Every width D that the linear layers below a module lead away from and back to.

    These are D of an up projection (D -> I, or D -> 2 I for a fused gate) and a down projection (I -> D). Of a plain
    pair, I is as possible as D.
    """
    shapes = Counter(linear_shape(layer) for layer in linear_layers(module))
    widths = {
        down[1]
        for down in shapes
        if down and any(shapes[up] > (up == down) for up in (down[::-1], (down[1], 2 * down[0])))
    }
    return sorted(widths)


def expert_counts(module: nn.Module) -> set[int]:
    """How many experts a module may hold: by stacked (E, in, out) weights, lists of MLPs, and what it says itself."""
    counts: set[int] = set()
    for part in module.modules():
        if isinstance(part, nn.modules.conv._ConvNd):
            continue
        shapes = map(true_shape, part.parameters(recurse=False))
        counts.update(shape[0] for shape in shapes if len(shape) == 3 and shape[0] > 1)
        children = list(part.children())
        if isinstance(part, nn.ModuleList) and len(children) > 1 and all(mirrored_widths(c) for c in children):
            counts.add(len(children))
        counts.update(
            value
            for name, value in vars(part).items()
            if "experts" in name and isinstance(value, int) and not isinstance(value, bool) and value > 1
        )
    return counts


def expert_sparsity(module: nn.Module) -> int:
    """How many experts there are for every one that a token goes to: E / k, or 1 for a dense block."""
    names = ("top_k", "topk", "moe_top_k", "num_experts_per_tok", "num_experts_per_token")
    chosen = [getattr(part, name, None) for part in module.modules() for name in names]
    per_token = max((k for k in chosen if isinstance(k, int)), default=1)
    return max(1, max(expert_counts(module), default=1) // max(1, per_token))


def capacity_limit(module: nn.Module) -> str | None:
    """``"name=value"`` of a limit on the tokens per expert, if a module below says that it has one."""
    for part in module.modules():
        for name, value in vars(part).items():
            if "capacity" in name and isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
                return f"{name}={value}"
    return None


def embedding_widths(model: nn.Module) -> set[int]:
    """The widths of the model's embedding tables."""
    return {m.embedding_dim for m in model.modules() if isinstance(m, nn.Embedding)}


def norm_widths(layer: nn.Module) -> set[int]:
    """The widths of the vectors that a layer's children hold, its norms' above all."""
    shapes = [true_shape(p) for child in layer.children() for p in child.parameters(recurse=False)]
    return {shape[0] for shape in shapes if len(shape) == 1}
