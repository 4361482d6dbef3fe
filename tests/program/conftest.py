"""A corpus and a model that train in a second."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from lightning_mst.cli import main
from lightning_mst.configurations import conf_dir

WORDS = ["long", "sequence", "memory", "token", "layer", "gradient", "loss", "head", "chunk", "attention", "model"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ten short text files."""
    folder = tmp_path_factory.mktemp("corpus")
    choose = random.Random(0)
    for index in range(10):
        lines = (" ".join(choose.choices(WORDS, k=12)) for _ in range(30))
        (folder / f"{index}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a run of two steps that takes a second."""
    return [
        "data=text",
        f"data.paths=['{corpus}/*.txt']",
        f"data.cache_dir='{tmp_path_factory.mktemp('cache')}'",
        "data.vocab_size=300",
        "data.sequence_length=64",
        "model.config.hidden_size=32",
        "model.config.intermediate_size=64",
        "model.config.num_hidden_layers=1",
        "trainer=cpu",
        "trainer.max_steps=2",
        "trainer.limit_val_batches=1",
    ]


@pytest.fixture
def train(tiny: list[str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``train(*overrides)`` runs the command in this process and gives back what it wrote to result.json."""

    def run(*overrides: str, folder: Path = tmp_path / "run") -> dict[str, Any]:
        main(["train", *tiny, f"hydra.run.dir='{folder}'", *overrides])
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))

    return run


@pytest.fixture
def compose_config() -> Callable[..., DictConfig]:
    """``compose_config(*overrides)`` composes a configuration without running anything."""

    def run(*overrides: str) -> DictConfig:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            return compose("config", overrides=["output_dir=here", *overrides])

    return run
