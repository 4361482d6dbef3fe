"""`lightning-mst report` on runs of all experiments, and of other sweeps."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from report_tools import GPU, TRAIN, block, longest, throughput, write_everything, write_run, write_sweep

from lightning_mst.program.sweep import MEASUREMENTS, show
from lightning_mst.report.main import main
from lightning_mst.report.picture import draw_report
from lightning_mst.report.read import find_runs
from lightning_mst.report.sections import sections_of
from lightning_mst.report.view import Section


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def section_of(folder: Path) -> Section:
    (section,) = sections_of(find_runs([folder]))
    return section


def titles(section: Section) -> list[str]:
    return [column.title for column in section.columns]


def values(section: Section, *keys: str) -> list[tuple[object, ...]]:
    return [tuple(row[key] for key in keys) for row in section.rows]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_everything(tmp_path_factory.mktemp("multirun"))


@pytest.fixture(scope="module")
def sections(everything: Path) -> dict[str, Section]:
    """By the name of the experiment."""
    return {s.rows[0]["experiment"] or "sweep": s for s in sections_of(find_runs([everything]))}


def test_a_sweep_of_every_experiment_makes_one_csv_one_page_and_one_picture(everything, sections, tmp_path, capsys):
    main([str(everything), "--output", str(tmp_path), "--title", "All of it"])

    printed, page = capsys.readouterr().out, (tmp_path / "report.md").read_text()
    assert len(sections) == 11
    assert all(section.title in printed and f"## {section.title}\n" in page for section in sections.values())
    assert page.startswith("# All of it\n\n![All of it](report.png)\n")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "report.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(section.rows) for section in sections.values())
    assert list(rows[0])[-6:] == ["paper", "ours_over_paper", "how", "device", "date", "error"]
    ours = next(row for row in rows if row["folder"] == "max_length/2")
    assert (ours["longest"], ours["paper"], ours["device"]) == ("101000", str(60 * 1024), GPU)
    assert float(ours["ours_over_paper"]) == 101_000 / (60 * 1024)  # in full


def test_every_row_is_in_the_picture_and_the_paper_s_figures_are_marked(sections):
    figure = draw_report("All of it", list(sections.values()))
    drawn = {name: part.axes for name, part in zip(sections, figure.subfigs, strict=True)}

    def marks(axes: Axes, marker: str) -> list[float]:
        return [
            line.get_ydata()[0] for line in axes.lines if line.get_marker() == marker and len(line.get_ydata()) == 1
        ]

    def lines(axes: Axes) -> dict[str, list[float]]:
        return {line.get_label(): list(line.get_ydata()) for line in axes.lines if len(line.get_ydata()) > 1}

    (lengths,) = drawn["paper/max_length"]
    heights = [bar.get_height() for bar in lengths.patches if bar.get_height()]
    assert heights == [row["longest"] for row in sections["paper/max_length"].rows]
    assert marks(lengths, "D") == [5120, 15360, 61440, 61440, 7168, 48128, 86016, 86016]
    speed, memory = drawn["paper/throughput"]
    assert len(marks(speed, "D")) == 6
    assert [text.get_text() for text in memory.texts].count("does not fit") == 3
    peaks, times = drawn["paper/lm_head"]
    assert marks(peaks, "D") == [59.92, 9.12, 6.11]
    assert list(lines(peaks)) == ["standard", "M = 2", "M = 4", "M = 8", "M = 16", "M = 32"]
    assert lines(times)["standard"] == pytest.approx([20.0] * 7)  # microseconds per token
    (breakdown,) = drawn["paper/breakdown"]
    assert [line.get_xdata()[0] for line in breakdown.lines if line.get_marker() == "D" and len(line.get_xdata())] == [
        75, 74, 52, 49,
    ]  # fmt: skip
    (timeline,) = drawn["paper/timeline"]
    assert [label.partition(":")[0] for label in lines(timeline) if "mst" in label] == [
        "mst=off (modelled)", "mst=recompute", "mst=paper", "mst=auto",
    ]  # fmt: skip
    loss, difference = drawn["paper/convergence"]
    assert list(lines(loss)) == ["mst=off", "mst=auto", "mst=paper"]
    assert list(lines(difference)) == ["mst=auto", "mst=paper"]
    assert difference.get_yscale() == "log"
    (contexts,) = drawn["paper/long_context"]
    assert lines(contexts)["trained at 8K tokens (run 1)"] == [63.0, 57.0, 53.0, 50.5, 49.0]
    memory, speed = drawn["sweep"]
    assert list(lines(memory)) == ["32-true", "bf16-true"]
    assert memory.get_xlabel() == "mst.mlp_chunks"
    assert lines(speed)["32-true"] == [1080.0, 1060.0, 1020.0, 940.0]


def test_the_paper_s_figures_stand_beside_runs_of_its_sizes(sections):
    def figures(experiment: str, *keys: str) -> list[tuple[object, ...]]:
        return [found for found in values(sections[f"paper/{experiment}"], *keys, "paper") if found[-1] is not None]

    assert figures("max_length", "model", "mst_name") == [
        ("llama3_8b", "off", 5120), ("llama3_8b", "recompute", 15360), ("llama3_8b", "paper", 61440),
        ("llama3_8b", "auto", 61440), ("llama2_7b", "off", 7168), ("llama2_7b", "recompute", 48128),
        ("llama2_7b", "paper", 86016), ("llama2_7b", "auto", 86016),
    ]  # fmt: skip
    ratios = dict(values(sections["paper/max_length"], "model", "paper_over_standard")[3::4])
    assert ratios == {"llama3_8b": 12, "llama2_7b": 12, "mistral_7b": 12, "qwen2_7b": 18, "gemma2_9b": 24}
    assert values(sections["paper/max_length"], "over_standard")[3] == (120_300 / 4989,)
    assert figures("max_length_accumulation", "model", "mst_name")[0] == ("llama3_8b", "recompute", 8192)
    assert figures("max_length_quantized", "precision", "mst_name")[:2] == [
        ("int8", "off", 5120), ("int8", "paper", 112_640),
    ]  # fmt: skip
    assert figures("throughput", "mst_name", "batch") == [
        ("recompute", 2, pytest.approx(2 * 8192 / 5.01)), ("paper", 2, pytest.approx(2 * 8192 / 5.13)),
        ("auto", 2, pytest.approx(2 * 8192 / 5.13)), ("recompute", "largest", pytest.approx(2 * 8192 / 5.01)),
        ("paper", "largest", pytest.approx(8 * 8192 / 19.35)), ("auto", "largest", pytest.approx(8 * 8192 / 19.35)),
    ]  # fmt: skip
    assert figures("lm_head", "sequence_length", "form") == [
        (80_000, "standard", 59.92), (80_000, "M = 16", 9.12), (80_000, "M = 32", 6.11),
    ]  # fmt: skip
    assert figures("mlp", "form") == [("standard", 14.72), ("M = 8", 11.66)]
    assert figures("breakdown", "mst_name", "paper_gradients_gib", "paper_activations_gib") == [
        ("off", 15, None, 75), ("off", None, 29, 74), ("recompute", None, 7, 52), ("paper", None, 4, 49),
    ]  # fmt: skip
    row = sections["paper/breakdown"].rows[2]
    assert row["activations_gib"] == pytest.approx(7.11)
    assert row["ours_over_paper"] == row["measured_peak_gib"] / 52


def test_runs_of_other_sizes_get_no_figure_of_the_paper_and_the_table_says_so(tmp_path):
    runs = [({"mst": mst}, longest(mst_name=mst)) for mst in ("off", "auto")]
    section = section_of(write_sweep(tmp_path / "sweep", "smoke/max_length", runs))

    assert values(section, "paper", "paper_over_standard") == [(None, None)] * 2
    assert "No figures of the paper: they belong to its sizes, experiment=paper/..." in section.lines


def test_a_figure_for_the_optimizer_in_the_backward_pass_does_not_stand_beside_another_optimizer(tmp_path):
    run = {
        "task": "breakdown", "model": "llama3_8b", "mst_name": "recompute", "optimizer": "adamw",
        "sequence_length": 4096, "batch_size": 1, "measured_peak_gib": None, "how": "predicted",
        "kinds_gib": {"weights": 15.0, "gradients": 15.0, "optimizer_states": 30.0, "logits": 4.0, "overhead": 0.5},
    }  # fmt: skip
    section = section_of(write_sweep(tmp_path / "sweep", "paper/breakdown", [({}, run)]))

    (row,) = section.rows
    assert (row["weights_gib"], row["activations_gib"], row["predicted_peak_gib"]) == (15.0, 4.0, 64.0)  # no overhead
    assert (row["paper"], row["paper_weights_gib"], row["how"]) == (None, None, "predicted")


def test_what_was_predicted_is_told_from_what_was_measured(tmp_path):
    both = [({"model": how}, longest(model=how, how=how)) for how in ("measured", "predicted")]
    section = section_of(write_sweep(tmp_path / "both", "paper/max_length", both))
    assert "how" in titles(section)
    assert section.made == f"measured and predicted, {GPU}, 2026-11-23"

    section = section_of(write_sweep(tmp_path / "one", "paper/max_length", both[1:]))
    assert "how" not in titles(section)
    assert section.lines[0].startswith(f"Predicted, {GPU}, 2026-11-23; torch 2.13.0, lightning_mst 0.1.0; runs in one")


def test_devices_and_dates_are_columns_where_they_differ(tmp_path):
    runs = [
        ({"mst": mst}, longest(mst_name=mst, device=mst, date=f"2026-11-2{mst == 'off'}")) for mst in ("off", "auto")
    ]
    section = section_of(write_sweep(tmp_path / "sweep", "paper/max_length", runs))

    assert titles(section)[-2:] == ["device", "date"]
    assert section.made == "measured"


def test_failed_and_dead_runs_stay_in_table_and_picture_with_their_error(tmp_path, capsys):
    choices = {"task": "longest", "experiment": "paper/max_length", "model": "llama3_8b", "mst": "paper"}
    runs = [
        ({"mst": "off"}, longest()),
        ({"mst": "paper"}, {"status": "failed", "error": "no memory [at all] | left", "rank": 0, "task": "longest"}),
        ({"mst": "auto"}, None),
    ]
    folder = write_sweep(tmp_path / "sweep", "paper/max_length", runs, choices=choices)
    (folder / "0" / "result.json").write_text((folder / "0" / "result.json").read_text()[:40])  # killed while writing

    main([str(folder)])

    section = section_of(folder)
    assert values(section, "run", "status", "mst_name", "longest") == [
        ("0", "failed", "paper", None), ("1", "failed", "paper", None), ("2", "failed", "paper", None),
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "Failed: 0. result.json can't be read" in printed
    assert "Failed: 1. no memory [at all] | left" in printed
    assert "Failed: 2. no result.json: the run died without a word, or is still running" in printed
    assert not (folder / "report.png").exists()  # there is nothing to draw

    (folder / "0" / "result.json").write_text(json.dumps({"status": "completed", **longest()}))
    main([str(folder)])
    assert (folder / "report.png").exists()
    assert "Failed: 1. no memory [at all] | left" in (folder / "report.md").read_text()


def test_an_experiment_that_ran_twice_is_shown_twice_with_its_dates(tmp_path):
    for day in ("2026-11-22", "2026-11-23"):
        write_sweep(
            tmp_path / day, "smoke/mlp", [({}, block("mlp", 1024, date=day)), ({}, block("mlp", 2048, date=day))]
        )

    first, second = sections_of(find_runs([tmp_path]))

    assert first.title == second.title == "One block by itself (smoke/mlp)"
    assert "2026-11-22" in first.lines[0]
    assert "2026-11-23" in second.lines[0]


def test_results_kept_without_hydra_s_files_are_enough(tmp_path):
    for number, mst in enumerate(("off", "auto")):
        write_run(tmp_path / str(number), {"experiment": "paper/max_length", **longest(mst_name=mst)})

    section = section_of(tmp_path)

    assert values(section, "mst_name", "paper") == [("off", 5120), ("auto", 61440)]


def test_any_other_sweep_shows_what_was_swept_and_what_came_out(tmp_path):
    runs = [
        ({"mst.mlp_chunks": str(chunks), "precision": precision}, {**TRAIN, "peak_memory_gib": 1 / chunks})
        for chunks in (1, 8)
        for precision in ("32-true", "int8-lora")
    ]
    folder = write_sweep(tmp_path / "sweep", None, runs)

    main([str(folder)])

    section = section_of(folder)
    assert titles(section) == ["run", "mst.mlp_chunks", "precision", "loss", "val perplexity", "tokens/s", "peak GiB"]
    assert values(section, "run", "mst.mlp_chunks", "precision", "peak_memory_gib") == [
        ("0", "1", "32-true", 1.0), ("1", "1", "int8-lora", 1.0),
        ("2", "8", "32-true", 0.125), ("3", "8", "int8-lora", 0.125),
    ]  # fmt: skip
    assert (folder / "report.png").exists()


def test_the_order_of_a_sweep_is_that_of_its_numbers(tmp_path):
    folder = write_sweep(tmp_path / "sweep", None, [({"seed": str(seed)}, TRAIN) for seed in range(12)])

    assert [row["seed"] for row in section_of(folder).rows] == [str(seed) for seed in range(12)]


def test_curves_are_compared_only_with_a_run_that_differs_in_nothing_but_mini_sequences(tmp_path):
    off = {**TRAIN, "mst_name": "off", "losses": [8.0, 7.0, 6.0, 5.0]}
    auto = {**TRAIN, "losses": [8.0, 7.0, 6.5, 5.25]}
    others = [{**auto, "seed": 1}, {**auto, "losses": [8.0, None, 6.0, 5.0]}]
    runs = [({"run": str(number)}, run) for number, run in enumerate([off, auto, *others])]
    section = section_of(write_sweep(tmp_path / "sweep", "smoke/convergence", runs))

    assert values(section, "difference", "compared") == [
        (None, None), (0.5, "run 0"), (None, "not comparable: seed 1, 0 in run 0"),
        (None, "not comparable: run 3 has steps without a finite loss"),
    ]  # fmt: skip

    for number, rate in enumerate((1e-3, 1e-4)):
        write_run(tmp_path / "rates" / str(number), {**(off, auto)[number], "experiment": "smoke/convergence"},
                  config={"optimizer": {"lr": rate}})  # fmt: skip
    assert values(section_of(tmp_path / "rates"), "compared")[1] == (
        "not comparable: other settings of optimizer than in run 0",
    )


def test_without_a_run_that_fits_unmodified_recomputation_is_what_curves_are_compared_with(tmp_path):
    runs = [({"mst": mst}, {**TRAIN, "mst_name": mst}) for mst in ("recompute", "auto")]
    section = section_of(write_sweep(tmp_path / "sweep", "paper/convergence", runs))

    assert values(section, "difference", "compared") == [(None, None), (0.0, "run 0")]
    main([str(tmp_path)])  # no difference at all can be drawn, too


def test_a_batch_that_does_not_fit_is_a_row(tmp_path):
    nothing = {"fits": False, "batch_size": None, "seconds_per_step": None, "tokens_per_second": None, "peak_gib": None}
    runs = [({"mst": "off"}, throughput(**nothing)), ({"mst": "auto"}, throughput(mst_name="auto"))]
    section = section_of(write_sweep(tmp_path / "sweep", "smoke/throughput", runs))

    assert values(section, "mst_name", "fits", "peak_gib") == [("off", False, None), ("auto", True, 60.0)]
    column = next(column for column in section.columns if column.key == "fits")
    assert [column.text(row) for row in section.rows] == ["no", "yes"]


def test_the_table_of_a_sweep_shows_what_its_runs_measure_and_names_the_report(tmp_path, capsys):
    show(tmp_path, [{"run": "0", "status": "completed", **dict.fromkeys(MEASUREMENTS), "loss": 7.0, "error": None}])

    printed = capsys.readouterr().out
    assert "7.0000" in printed
    assert "tokens/s" not in printed
    assert f"lightning-mst report {tmp_path}" in printed


def test_two_folders_that_overlap_count_a_run_once(tmp_path, monkeypatch):
    write_sweep(tmp_path / "a", None, [({"seed": "0"}, TRAIN), ({"seed": "1"}, TRAIN)])

    monkeypatch.chdir(tmp_path)
    assert len(find_runs([tmp_path, Path("a"), tmp_path / "a" / "0"])) == 2


def test_a_folder_without_runs_or_no_folder_at_all_is_an_error_that_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([str(tmp_path)])
    assert exit_info.value.code == 1
    assert f"no run (result.json) in or below {tmp_path}" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_info:
        main([str(tmp_path / "nowhere")])
    assert exit_info.value.code == 2
    assert "DIR should be a folder with runs" in capsys.readouterr().err


def test_without_matplotlib_the_tables_are_written_all_the_same(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run", TRAIN)
    for name in ("lightning_mst.report.picture", "matplotlib.figure"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    main([str(tmp_path)])

    assert "pip install 'lightning-mst[plots]'" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["report.csv", "report.md", "run"]
    assert "report.png" not in (tmp_path / "report.md").read_text()
