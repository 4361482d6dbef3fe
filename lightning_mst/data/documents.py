"""Where documents come from: the standard library, files, or any data set that ``datasets`` can load."""

from __future__ import annotations

import glob
import hashlib
import importlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_mst.data.cache import cache_key

SOURCES = ("stdlib", "text", "jsonl", "parquet", "hub")
"""The values of ``source``."""

FILE_SOURCES = ("text", "jsonl", "parquet")
"""The sources that read ``paths``."""

_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_JSON_LINES = (".jsonl", ".json", ".ndjson")
_SUFFIXES = {
    "text": (".txt",),  # what a folder is searched for; a file that is named may have any suffix not listed below
    "jsonl": _JSON_LINES + tuple(suffix + packed for suffix in _JSON_LINES for packed in _COMPRESSIONS),
    "parquet": (".parquet",),
}
_NOT_TEXT = (*_COMPRESSIONS, ".zip", ".tar", ".arrow", ".csv", ".pdf", ".docx", ".npy", ".npz", ".bin", ".pt")
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_READ_AT_ONCE = 256  # documents; a data set on disk answers one request for many rows much faster than many for one


class Documents:
    """A sequence of texts, in memory or on disk, with a fingerprint of their content.

    Args:
        read: Returns the texts at some positions of the underlying store.
        indices: int64 ``[num_documents]``, the positions that belong to this sequence, in its order.
        fingerprint: Stands for the content of these documents in this order; equal text, equal fingerprint.
    """

    def __init__(self, *, read: Callable[[Sequence[int]], list[str]], indices: np.ndarray, fingerprint: str) -> None:
        self._read = read
        self._indices = indices
        self.fingerprint = fingerprint

    @classmethod
    def from_texts(cls, texts: Sequence[str]) -> Documents:
        """Wrap texts that are in memory."""
        digest = hashlib.sha256()
        for text in texts:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return cls(
            read=lambda indices: [texts[index] for index in indices],
            indices=np.arange(len(texts)),
            fingerprint=digest.hexdigest(),
        )

    @classmethod
    def from_dataset(cls, dataset: Any, *, text_column: str) -> Documents:
        """Wrap one column of a ``datasets.Dataset``; rows are read from disk when they are needed.

        The data set's own fingerprint is used, so that a large one need not be read to find its cached tokens.

        Raises:
            ValueError: The data set has no such column, or the column holds something else than strings.
        """
        if text_column not in dataset.column_names:
            raise ValueError(
                f"The data has no column {text_column!r}; its columns are {dataset.column_names}. "
                "Set text_column to the one that holds the text."
            )
        kind = getattr(dataset.features[text_column], "dtype", type(dataset.features[text_column]).__name__)
        if kind not in ("string", "large_string", "string_view"):
            raise ValueError(
                f"Column {text_column!r} holds {kind}, not strings. Set text_column to the column that holds the "
                f"text; the columns are {dataset.column_names}."
            )
        rows = dataset.select_columns([text_column])
        return cls(
            read=lambda indices: [text or "" for text in rows[list(indices)][text_column]],  # a null is no text
            indices=np.arange(len(rows)),
            fingerprint=cache_key(dataset._fingerprint, text_column),
        )

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _READ_AT_ONCE):
            yield from self._read(self._indices[start : start + _READ_AT_ONCE].tolist())

    def select(self, positions: np.ndarray) -> Documents:
        """Return the documents at ``positions`` (int64 ``[n]``), in that order, without reading them."""
        return Documents(
            read=self._read,
            indices=self._indices[positions],
            fingerprint=cache_key(self.fingerprint, positions.astype("<i8").tobytes().hex()),
        )


def load_documents(
    source: str = "stdlib",
    *,
    paths: str | Sequence[str] | None = None,
    path: str | None = None,
    name: str | None = None,
    split: str = "train",
    text_column: str = "text",
) -> Documents:
    """Find the documents of a source, in the source's own order.

    Args:
        source: ``"stdlib"``: the Python standard library of the running interpreter. ``"text"``: each UTF-8 file is
            a document. ``"jsonl"``, ``"parquet"``: each row is a document. ``"hub"``: each row of whatever
            ``datasets.load_dataset`` finds under ``path``, a name on the Hugging Face hub or a local folder.
        paths: For ``text``, ``jsonl`` and ``parquet``: files, globs (``**`` goes into folders), or folders, which
            are searched at any depth for files of the source's type (``.txt`` for ``text``).
        path: For ``hub``: the data set.
        name: For ``hub``: its configuration.
        split: For ``hub``: its split, such as ``"train"`` or ``"train[:10%]"``.
        text_column: For ``jsonl``, ``parquet`` and ``hub``: the column that holds the text.

    Returns:
        The documents, at least one. Rows without text are still counted here; encoding skips them.

    Raises:
        ValueError: An unknown source or file type, arguments that do not fit the source, a missing column, a file
            that cannot be parsed, or no text at all.
        FileNotFoundError: A path or a glob matches nothing, the data set cannot be found, or the interpreter has no
            standard library in source form.
        ModuleNotFoundError: The source needs ``datasets``, which is not installed.
    """
    check_source(source, paths=paths, path=path)
    if source == "stdlib":
        return Documents.from_texts(_stdlib_texts())
    if source == "hub":
        return _load_hub(str(path), name=name, split=split, text_column=text_column)
    files = find_files(paths or (), source=source)
    if source == "text":
        return Documents.from_texts(_read_texts(files, named=_as_list(paths)))
    return _load_rows(files, source=source, text_column=text_column)


def check_source(source: str, *, paths: str | Sequence[str] | None, path: str | None) -> None:
    """Raise a ValueError if ``source`` is unknown or lacks, or cannot use, ``paths`` or ``path``."""
    if source not in SOURCES:
        raise ValueError(f"Unknown source {source!r}; expected one of {', '.join(SOURCES)}.")
    if source in FILE_SOURCES and not paths:
        raise ValueError(f"source={source!r} needs paths: files, globs or folders to read.")
    if source == "hub" and not path:
        raise ValueError("source='hub' needs path: the name of a data set, or a local folder.")
    if source not in FILE_SOURCES and paths:
        raise ValueError(
            f"source={source!r} does not read paths, but paths={_as_list(paths)} was given. "
            f"Set source to one of {', '.join(FILE_SOURCES)}."
        )
    if source != "hub" and path:
        raise ValueError(
            f"source={source!r} does not read path, but path={path!r} was given. Set source='hub', or use paths."
        )


def find_files(paths: str | Sequence[str], *, source: str) -> list[Path]:
    """Turn files, globs and folders into the files they name, sorted within each entry, each file once.

    Raises:
        FileNotFoundError: An entry matches no file.
        ValueError: A file's type does not fit ``source``.
    """
    found: dict[Path, None] = {}  # an ordered set
    for entry in _as_list(paths):
        expanded = os.path.expanduser(entry)
        if os.path.isdir(expanded):
            matches = [
                file
                for file in Path(expanded).rglob("*")
                if file.name.lower().endswith(_SUFFIXES[source]) and file.is_file()
            ]
            missing = f"The folder {entry!r} holds no {' or '.join(_SUFFIXES[source][:3])} file"
        elif os.path.isfile(expanded):
            matches = [Path(expanded)]
            missing = ""
        elif glob.has_magic(expanded):
            matches = [Path(match) for match in glob.glob(expanded, recursive=True) if os.path.isfile(match)]
            missing = f"The glob {entry!r} matches no file"
        else:
            matches = []
            missing = f"There is no file {entry!r}"
        if not matches:
            raise FileNotFoundError(f"{missing} (in the working directory {os.getcwd()}).")
        for match in sorted(matches):
            _check_type(match, source=source)
            found[match.absolute()] = None
    return list(found)


def _check_type(file: Path, *, source: str) -> None:
    name = file.name.lower()
    fitting = next((kind for kind in ("jsonl", "parquet") if name.endswith(_SUFFIXES[kind])), None)
    if fitting == source or (source == "text" and fitting is None and not name.endswith(_NOT_TEXT)):
        return
    expected = "plain text" if source == "text" else " or ".join(_SUFFIXES[source][:3])
    advice = f"set source={fitting!r}" if fitting else "convert it, or leave it out of paths"
    raise ValueError(f"source={source!r} reads {expected}, got the file {str(file)!r}: {advice}.")


def _as_list(paths: str | Sequence[str] | None) -> list[str]:
    if paths is None:
        return []
    return [str(paths)] if isinstance(paths, (str, os.PathLike)) else [str(entry) for entry in paths]


def _read_texts(files: list[Path], *, named: list[str]) -> list[str]:
    explicit = {Path(os.path.expanduser(entry)).absolute() for entry in named}
    texts = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"The file {str(file)!r} is not UTF-8 text ({error.reason} at byte {error.start}). Convert it to "
                "UTF-8, or leave it out of paths."
            ) from error
        if text.strip():
            texts.append(text)
        elif file in explicit:  # a folder may hold empty files, but a file that was asked for should have text
            raise ValueError(f"The file {str(file)!r} is empty. Give a file that holds text.")
    if not texts:
        raise ValueError(f"All {len(files)} files of paths={named} are empty. Give files that hold text.")
    return texts


def _stdlib_texts() -> list[str]:
    """Read the standard library's modules and pydoc's topics, sorted by relative path; tests are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, str] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY]
        for name in names:
            file = Path(folder, name)
            key = file.relative_to(root).as_posix()
            if file.suffix != ".py" or key == "pydoc_data/topics.py":  # the topics come below, as prose
                continue
            try:
                text = file.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text.strip():
                texts[key] = text
    if not texts:
        raise FileNotFoundError(
            f"source='stdlib' reads the .py files of the standard library, but {str(root)!r} holds none: this Python "
            "keeps them in an archive or in compiled form. Set source='text' and paths to text of your own."
        )
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions ship it apart
        topics = {}
    texts.update({f"pydoc_data/topics/{topic}": text for topic, text in topics.items()})
    return [texts[key] for key in sorted(texts)]


def _import_datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The sources jsonl, parquet and hub need the package `datasets`: pip install 'lightning-mst[data]'",
            name=error.name,
        ) from error
    return datasets


def _load_rows(files: list[Path], *, source: str, text_column: str) -> Documents:
    datasets = _import_datasets()
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"The file {str(file)!r} is empty. Give a file that holds rows.")
    builder = "json" if source == "jsonl" else "parquet"
    # Brackets, stars and question marks of real file names are not patterns.
    data_files = [glob.escape(str(file)) for file in files]
    try:
        dataset = datasets.load_dataset(builder, data_files=data_files, split="train")
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        cause = error.__cause__ or error  # the former only says that an error occurred
        raise ValueError(
            f"source={source!r} cannot read {[str(file) for file in files]}: {cause}. Check that every file is valid "
            "and has rows, and that all have the same columns."
        ) from error
    return Documents.from_dataset(dataset, text_column=text_column)


def _load_hub(path: str, *, name: str | None, split: str, text_column: str) -> Documents:
    datasets = _import_datasets()
    try:
        dataset = datasets.load_dataset(path, name, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"source='hub' finds no data set under path={path!r}: it is no local folder with data files, and the hub "
            f"does not have it or cannot be reached ({error}). Check the name, or download it first."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"source='hub' cannot load split={split!r} of path={path!r} with name={name!r}: {error} "
            "Set split and name to what the data set has."
        ) from error
    return Documents.from_dataset(dataset, text_column=text_column)
