"""Settings side by side."""

from __future__ import annotations

import csv
import json
import sys

import pytest

from lightning_mst.cli import main
from lightning_mst.program.compare import compare, parse


def result(losses: list[float | None], peak: float | None, speed: float | None) -> dict:
    shared = {"model": "m", "parameters": 1, "precision": "32-true", "sequence_length": 8, "batch_size": 1}
    return {
        **shared,
        "steps": len(losses),
        "losses": losses,
        "loss": losses[-1],
        "peak_memory_gib": peak,
        "tokens_per_second": speed,
    }


def test_ratios_and_differences_are_to_the_first_setting():
    report = compare({"off": result([3.0, 2.0], 4.0, 100.0), "auto": result([3.5, 1.75], 1.0, 80.0)})

    first, second = report["settings"]
    assert (first["peak_memory_ratio"], first["tokens_per_second_ratio"], first["loss_difference"]) == (1.0, 1.0, 0.0)
    assert (second["peak_memory_ratio"], second["tokens_per_second_ratio"]) == (0.25, 0.8)
    assert (second["loss"], second["loss_difference"]) == (1.75, 0.5)


def test_what_was_not_measured_has_no_ratio():
    report = compare({"off": result([1.0], None, None), "auto": result([None], 1.0, 2.0)})

    assert report["settings"][1]["peak_memory_ratio"] is None
    assert report["settings"][1]["tokens_per_second_ratio"] is None
    assert report["settings"][1]["loss_difference"] is None


def test_overrides_may_stand_anywhere_on_the_command_line(tmp_path):
    argv = ["a=1", "--mst", "off", "paper", "b=2", "~logger", "--steps", "3", "c=3", "--output", str(tmp_path)]

    settings, steps, output, overrides = parse(argv)

    assert (settings, steps, output) == (["off", "paper"], 3, tmp_path)
    assert sorted(overrides) == ["a=1", "b=2", "c=3", "~logger"]


def test_the_default_compares_off_and_auto():
    settings, _, output, overrides = parse([])

    assert settings == ["off", "auto"]
    assert output.name.endswith("-compare")
    assert overrides == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mst", "off", "fast"], "unknown --mst fast; there are auto, "),
        (["--mst", "off", "off"], "--mst names a setting twice"),
        (["--mst", "a=1"], "--mst needs the name of a setting"),
        (["--steps", "0"], "--steps should be 1 or more, got 0"),
        (["mst=paper"], "name its settings after --mst"),
        (["paper"], "not an override (key=value): paper"),
    ],
)
def test_a_wrong_command_line_is_explained_and_exits_with_2(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(argv)

    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_compare_leaves_a_table_and_a_chart(tiny, tmp_path, capsys):
    output = tmp_path / "it's here"
    main(["compare", "--steps", "3", "--output", str(output), *tiny])

    report = json.loads((output / "compare.json").read_text(encoding="utf-8"))
    assert [row["mst"] for row in report["settings"]] == ["off", "auto"]
    assert (report["steps"], report["sequence_length"], report["model"]) == (3, 64, "llama_small")
    for row in report["settings"]:
        assert row["peak_memory_gib"] > 0
        assert row["tokens_per_second"] > 0
        assert row["loss_difference"] < 1e-4
    with (output / "compare.csv").open(newline="", encoding="utf-8") as file:
        assert [row["mst"] for row in csv.DictReader(file)] == ["off", "auto"]
    assert (output / "compare.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert "peak memory (GiB)" in text
    assert "3 steps of 1 x 64 tokens" in text
    assert json.loads((output / "off" / "result.json").read_text(encoding="utf-8"))["val_perplexity"] is None


def test_a_failing_run_shows_the_end_of_its_stderr(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["compare", "--output", str(tmp_path), *tiny, "model.config.hidden_size=33"])

    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert "The hidden size (33)" in error
    assert "the run mst=off ended with code 1" in error
    assert not (tmp_path / "compare.json").exists()


def test_without_matplotlib_the_table_is_shown_and_the_extra_named(tmp_path, capsys, monkeypatch):
    done = {"off": result([3.0], 4.0, 100.0), "auto": result([3.0], 1.0, 80.0)}
    monkeypatch.setattr("lightning_mst.program.compare.run", lambda setting, *_: done[setting])
    monkeypatch.delitem(sys.modules, "lightning_mst.program.plot", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NoMatplotlib(), *sys.meta_path])

    main(["compare", "--output", str(tmp_path)])

    text = capsys.readouterr().out
    assert "1.00 (0.25x)" in text
    assert "pip install 'lightning-mst[plots]'" in text
    assert not (tmp_path / "compare.png").exists()


class NoMatplotlib:
    """An import system in which matplotlib is not installed."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
