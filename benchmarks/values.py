"""The numbers of README and docs by name, each from a committed result file or from the code itself."""

from __future__ import annotations

import csv
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.outputs import FOLDER, ROOT
from lightning_mst.ops import chunking
from lightning_mst.training import predicted_check

_RESULTS = ROOT / "benchmarks" / "results"


@cache
def values() -> dict[str, str]:
    """Name -> the number as the pages show it, with its unit."""
    sources = _of_comparison, _of_plan, _of_ladder, _of_memory, _of_paper, _of_support_table, _of_experiments, _of_code
    return {name: value for source in sources for name, value in source().items()}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _of_comparison() -> dict[str, str]:
    """``lightning-mst compare`` on two CPU cores."""
    report = _read(FOLDER / "compare.json")
    auto = next(row for row in report["settings"] if row["mst"] == "auto")
    return {
        "compare_tokens": f"{report['sequence_length']:,} tokens",
        "compare_memory": f"{auto['peak_memory_ratio']:.2f}x",
        "compare_speed": f"{auto['tokens_per_second_ratio']:.2f}x",
    }


def _of_plan() -> dict[str, str]:
    """``lightning-mst plan`` for Llama-3-8B on 80 GiB: predicted."""
    report = _read(FOLDER / "plan.json")
    longest = {rung["mst"]: rung["max_length"] for rung in report["rungs"]}
    return {
        "plan_off": f"{longest['off']:,} tokens",
        "plan_recompute": f"{longest['recompute']:,} tokens",
        "plan_auto": f"{longest['auto']:,} tokens",
        "plan_memory": f"{report['device_memory_gib']:.0f} GiB",
    }


def _of_ladder() -> dict[str, str]:
    """``lightning-mst plan --ladder`` for Llama-3-8B on 80 GiB: predicted."""
    report = _read(FOLDER / "plan_ladder.json")
    rungs = {rung["optimizer"] or rung["mst"]: rung for rung in report["rungs"]}
    found = {}
    for name, rung in rungs.items():
        found[f"ladder_{name}"] = f"{rung['max_length']:,} tokens"
        found[f"ladder_{name}_host"] = f"{rung['host_gib']:.0f} GiB"
    return found


def _of_memory() -> dict[str, str]:
    """The README's first picture: a small Llama, bytes of tensors counted."""
    result = _read(_RESULTS / "memory-cpu.json")
    peak = {name: peaks[-1] for name, peaks in result["peak_bytes"].items()}
    return {
        "picture_tokens": f"{result['lengths'][-1]:,} tokens",
        "picture_over_standard": f"{peak['standard'] / peak['mini-sequences']:.1f} times",
        "picture_over_recompute": f"{peak['activation recomputation'] / peak['mini-sequences']:.1f} times",
    }


def _of_paper() -> dict[str, str]:
    rows = _read(_RESULTS / "paper-memory.json")["sections"]
    return {
        "paper_length_bound": f"{rows['lengths'][0]['bound']:.0%}",
        "paper_ratio_bound": f"{rows['ratios'][0]['bound']:.0%}",
    }


def _of_support_table() -> dict[str, str]:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    found = re.search(r"(\d+ families) of transformers", text)
    assert found is not None
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| ")]
    with_layers = sum(row[rows[0].index("layer")] == "yes" for row in rows)
    return {"families": found[1], "layer_families": f"{with_layers} of the families"}


def _of_experiments() -> dict[str, str]:
    """The experiments in small: ``make experiments``."""
    with (ROOT / "docs" / "experiments" / "smoke" / "report.csv").open(encoding="utf-8") as file:
        convergence = (row for row in csv.DictReader(file) if row["experiment"] == "smoke/convergence")
        row = next(row for row in convergence if row["difference"])
    return {
        "convergence_steps": f"{int(row['steps'])} steps",
        "convergence_difference": f"{float(row['difference']):.1e}",
    }


def _of_code() -> dict[str, str]:
    return {
        "mlp_chunk": f"{chunking.MLP_MIN_TOKENS:,} tokens",
        "head_chunk": f"{chunking._LM_HEAD_MIN_TOKENS:,} tokens",
        "few_logits": f"{chunking._FEW_LOGITS_BYTES // 2**20} MiB",
        "prediction_tolerance": f"{predicted_check.TOLERANCE:.0%}",
    }
