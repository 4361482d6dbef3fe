"""The planner against the paper's own figures: ``docs/paper_memory.md``."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")
from benchmarks.paper import rows, stream
from benchmarks.paper.allocator import MIB, CachingAllocator, OutOfMemory
from benchmarks.paper.rows import CAPACITY, LENGTH_BOUND, RATIO_BOUND
from benchmarks.paper.table import PAGE, RESULTS, page
from lightning_mst.report.paper import NUMBERS, K

RECORDED = json.loads(RESULTS.read_text())["sections"]


@pytest.mark.parametrize("model", NUMBERS["max_length_k"])
def test_the_paper_s_code_reaches_the_paper_s_lengths_within_15_percent(model):
    for which, figure in NUMBERS["max_length_k"][model].items():
        steps = rows.replay(model, which)
        assert steps.fits(int((1 - LENGTH_BOUND) * figure * K), CAPACITY), which
        assert not steps.fits(int((1 + LENGTH_BOUND) * figure * K), CAPACITY), which


@pytest.mark.parametrize("model", NUMBERS["mst_over_standard"])
def test_mini_sequences_lengthen_other_models_sequences_as_in_the_paper_within_25_percent(model):
    standard, _ = rows.max_length(model, "standard")
    paper = standard * NUMBERS["mst_over_standard"][model]
    steps = rows.replay(model, "mst")
    assert steps.fits(int((1 - RATIO_BOUND) * paper), CAPACITY)
    assert not steps.fits(int((1 + RATIO_BOUND) * paper), CAPACITY)


@pytest.mark.parametrize("section", ["blocks", "breakdown"])
def test_the_page_s_bytes_are_what_is_predicted_now(section):
    now = rows.SECTIONS[section]()
    assert [row.name for row in now] == [row["name"] for row in RECORDED[section]]
    for row, recorded in zip(now, RECORDED[section], strict=True):
        assert row.predicted == pytest.approx(recorded["predicted"], rel=0.02), row.name


def test_the_page_s_lengths_are_what_is_predicted_now():
    standard = {row["name"]: row["predicted"] for row in RECORDED["lengths"] if "standard" in row["name"]}
    assert list(standard) == ["Llama3-8B, standard", "Llama2-7B, standard"]
    for model, length in zip(("llama3_8b", "llama2_7b"), standard.values(), strict=True):
        assert rows.max_length(model, "standard")[0] == pytest.approx(length, rel=0.02)


def test_the_page_shows_the_recorded_results_and_each_checked_figure_is_within_its_bound():
    results = json.loads(RESULTS.read_text())
    assert PAGE.read_text() == page(results), "run `make paper-table`"
    checked = [rows.Row(**row) for row in [*results["sections"]["lengths"], *results["sections"]["ratios"]]]
    assert len(checked) == 9
    assert all(row.bound is not None and row.is_within for row in checked)


def test_a_few_recorded_layers_speak_for_a_model_of_any_depth():
    def events(num_layers: int) -> list[stream.Event]:
        return stream.record(rows.setting("llama2_7b", "recompute", num_layers=num_layers), 768)

    assert [size for _, size in stream.stretched(events(5), 7)] == [event.size for event in events(7)]


def test_the_allocator_gives_whole_free_segments_back_but_not_ones_with_a_tensor_in_them():
    allocator = CachingAllocator(100 * MIB)
    large = allocator.allocate(60 * MIB)
    allocator.free(large)
    allocator.free(allocator.allocate(80 * MIB))  # the 60 MiB are given back for it
    assert allocator.reserved == 80 * MIB
    small = allocator.allocate(20 * MIB)  # now lives in the 80 MiB
    with pytest.raises(OutOfMemory):
        allocator.allocate(70 * MIB)
    allocator.free(small)
    allocator.allocate(70 * MIB)


def test_the_allocator_joins_free_neighbours():
    allocator = CachingAllocator(60 * MIB)
    allocator.free(allocator.allocate(60 * MIB))
    parts = [allocator.allocate(20 * MIB) for _ in range(3)]
    assert allocator.reserved == 60 * MIB
    for part in (parts[0], parts[2], parts[1]):
        allocator.free(part)
    assert allocator.allocate(60 * MIB).address == 0
