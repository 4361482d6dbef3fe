"""The command line itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lightning_mst
from lightning_mst.cli import main


def test_help_names_all_commands(capsys):
    for argv in ([], ["--help"], ["-h"]):
        main(argv)
        text = capsys.readouterr().out
        assert text.startswith("usage: lightning-mst COMMAND")
        assert "train" in text
        assert "compare" in text
        assert "plan" in text


def test_the_version_is_the_packages(capsys):
    main(["--version"])

    assert capsys.readouterr().out == f"lightning-mst {lightning_mst.__version__}\n"


def test_an_unknown_command_is_named_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["trian"])

    assert exit_info.value.code == 2
    assert capsys.readouterr().err == (
        "lightning-mst: unknown command 'trian'; there are train, compare, plan and report (see --help)\n"
    )


def test_help_runs_as_a_module_without_loading_torch():
    code = (
        "import runpy, sys; sys.argv = ['lightning-mst', '--help'];"
        "runpy.run_module('lightning_mst', run_name='__main__');"
        "print(sorted({'torch', 'lightning', 'transformers', 'hydra'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "usage: lightning-mst COMMAND" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_of_train_lists_the_groups(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "--help"])

    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    layer = "layer, layer_offload, layer_offload_attention"
    assert f"mst: auto, fit, {layer}, lm_head_only, no_recompute, off, paper, recompute" in text
    assert "model: gemma2_9b" in text


def test_train_shows_the_composed_configuration_without_training(capsys):
    main(["train", "--cfg", "job", "mst=off", "precision=bf16-true", "--package", "mst"])

    assert "checkpoint_layers: none" in capsys.readouterr().out


def test_a_users_own_folder_adds_options(capsys, tmp_path):
    (tmp_path / "mst").mkdir()
    (tmp_path / "mst" / "mine.yaml").write_text("mlp_chunks: 7\n", encoding="utf-8")

    main(["train", "--config-dir", str(tmp_path), "--cfg", "job", "mst=mine", "--package", "mst"])

    assert "mlp_chunks: 7" in capsys.readouterr().out


def test_the_command_line_of_the_process_is_left_as_it_was(capsys):
    before = list(sys.argv)

    main(["train", "--cfg", "job"])

    assert sys.argv == before
