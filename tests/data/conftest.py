import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_mst.data import Documents, train_tokenizer

SENTENCE = "the cat sat on a mat while two dogs ran over green hills and blue rivers under old stars"


def story(number: int, *, words: int = 60) -> str:
    """A text that differs for every number."""
    vocabulary = SENTENCE.split()
    chosen = [vocabulary[(number * 7 + step * step) % len(vocabulary)] for step in range(words)]
    return " ".join(chosen) + f" {number}.\n"


@pytest.fixture(autouse=True)
def huggingface_stays_in_tmp(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("huggingface"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def stories() -> list[str]:
    return [story(number) for number in range(40)]


@pytest.fixture
def text_folder(tmp_path: Path, stories: list[str]) -> Path:
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    for number, text in enumerate(stories):
        place = folder / "more" if number % 2 else folder
        (place / f"{number:02}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(texts: list, *, column: str = "text", file: str = "rows.jsonl") -> Path:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps({column: text, "id": number}) for number, text in enumerate(texts)]
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def small_tokenizer(stories: list[str], cache_dir: Path):
    return train_tokenizer(Documents.from_texts(stories), vocab_size=300, cache_dir=cache_dir)


@pytest.fixture
def files_in() -> Callable[[Path], dict[str, int]]:
    """Name -> time of the last change, for every file of a folder: unchanged means that nothing was written again."""
    return lambda folder: {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(folder)}
