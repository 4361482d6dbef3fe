"""Every causal language model of the installed transformers: the same loss and gradients, or a reason why not.

The support table in docs/models.md is this file's result: ``make support-table`` writes it there.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import FAMILIES, CannotBuild, build_and_train
from rewrite_models import furthest, gradients
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_mst import MSTHandle, apply_mst
from lightning_mst.ops.deferred_logits import DeferredLogitsWarning

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TABLE = re.compile(r"(?<=<!-- support-table -->\n).*(?=<!-- /support-table -->)", re.DOTALL)
# The version that the table is about; others are tested, and not compared with it.
TABLE_VERSION = "5.23.0"


@dataclass(frozen=True)
class Result:
    mlp: str
    head: str
    layer: str
    checkpointing: str
    digits: str
    note: str


RESULTS: dict[str, Result] = {}


class ComputesInSinglePrecision(TorchDispatchMode):
    """Sees whether a model in fp64 computes some of its work in fp32."""

    found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.found |= any(
            isinstance(t, Tensor) and t.dtype == torch.float32 and t.dim() > 1 for t in tree_leaves(result)
        )
        return result


def describe(handle: MSTHandle) -> tuple[str, str, str, str, str]:
    def rows(block: str, form: bool) -> list:
        return [row for row in handle.rows if row.block == block and row.rewritten == form]

    def answer(block: str) -> str:
        return "yes" if rows(block, True) else "no"

    layers = rows("layer", True), rows("layer", False)
    notes = [row.reason for block in ("MLP", "LM head") for row in rows(block, True) if row.reason]
    blocks = ("MLP", "LM head", "attention", "layer")
    notes += [f"{row.module or row.block}: {row.reason}" for block in blocks for row in rows(block, False)]
    # What a probe measured differs in its last digits from machine to machine.
    notes = [re.sub(r" \((a probe|[A-Z]\w*(Error|Exception)).*\)", "", note) for note in notes]
    checkpointing = "per layer" if layers[0] else "no"
    return answer("MLP"), answer("LM head"), answer("attention"), checkpointing, "; ".join(dict.fromkeys(notes))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_unmodified_models(family, batch):
    ids, labels = batch

    def own_loss(model: nn.Module) -> Tensor:
        return model(input_ids=ids, labels=labels, use_cache=False).loss

    def written_by_hand(model: nn.Module) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def unmodified(model: nn.Module) -> tuple[dict, bool]:
        with ComputesInSinglePrecision() as single:
            written_by_hand(model)
        return {loss: gradients(model, loss(model)) for loss in (own_loss, written_by_hand)}, single.found

    try:
        model, (expected, in_single_precision) = build_and_train(family, unmodified, router_losses=False)
    except CannotBuild as reason:
        pytest.skip(str(reason))
    handle = apply_mst(model, mlp_chunks=4, lm_head_chunks=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeferredLogitsWarning)
        # transformers casts logits to fp32 for its own loss.
        assert furthest(gradients(model, own_loss(model)), expected[own_loss]) < 1e-5
        distance = furthest(gradients(model, written_by_hand(model)), expected[written_by_hand])
        handle.update(layer_chunks=3)
        distance = max(distance, furthest(gradients(model, written_by_hand(model)), expected[written_by_hand]))
    assert distance < (1e-6 if in_single_precision else 1e-10)
    mlp, head, layer, checkpointing, note = describe(handle)
    RESULTS[family] = Result(mlp, head, layer, checkpointing, "1e-10" if distance < 1e-10 else "1e-6", note)
    assert head == "yes"
    assert mlp == "yes" or note


def test_the_support_table_is_what_these_tests_found():
    built = set(RESULTS)
    if transformers.__version__ != TABLE_VERSION or len(built) < 100:
        pytest.skip(f"the table is about all families of transformers {TABLE_VERSION}")
    lines = [
        "| family | MLP | LM head | layer | checkpointing | gradients to | what is special |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {family} | {r.mlp} | {r.head} | {r.layer} | {r.checkpointing} | {r.digits} | {r.note} |"
        for family, r in sorted(RESULTS.items())
    ]
    counted = f"{len(built)} families of transformers {TABLE_VERSION}, all exact"
    table = f"<details>\n<summary>{counted}</summary>\n\n" + "\n".join(lines) + "\n\n</details>\n"
    text = PAGE.read_text(encoding="utf-8")
    if os.environ.get("WRITE_SUPPORT_TABLE"):
        PAGE.write_text(TABLE.sub(lambda _: table, text), encoding="utf-8")
    else:
        found = TABLE.search(text)
        assert found is not None
        assert found[0] == table, "make support-table writes the table anew"
