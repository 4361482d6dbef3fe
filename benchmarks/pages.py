"""``python -m benchmarks.pages``: fills in what README and docs show from the files that it was measured or written in.

Between markers, which no reader sees, stands what the marker names::

    <!-- value:NAME -->0.33x<!-- /value -->        a number, made in benchmarks/values.py
    <!-- output:NAME --> ... <!-- /output -->      docs/outputs/NAME.txt, what a program printed

A number that a test holds names it in its paragraph or table: ``<!-- test:tests/file.py::test_name -->``.
``tests/test_readme.py`` fails when a page and its sources differ, and when a number has no source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.outputs import FOLDER, ROOT
from benchmarks.values import values

# Made as a whole by `make paper-table`, with a test of its own.
_GENERATED = {"paper_memory.md"}
_MARKED = re.compile(r"<!-- (value|output):(\w+) -->(.*?)<!-- /\1 -->", re.DOTALL)
# What has another source: what is marked, the tables of tests and benchmarks, programs, names and links.
_SOURCED = [
    _MARKED,
    re.compile(r"<!-- (support-table|benchmark:\w+) -->.*?<!-- /\1 -->", re.DOTALL),
    re.compile(r"^```(?!text).*?^```", re.DOTALL | re.MULTILINE),
    re.compile(r"`[^`]*`"),
    re.compile(r"\]\([^)]*\)"),
]
_UNIT = r"(?:%|x\b|[KMG]i?B\b|(?:times|passes|seconds?|minutes?|hours?|tokens?|families)\b)"
_MEASURED = re.compile(rf"\d[\d,.]*(?:e-?\d+)?\s?{_UNIT}|\d+(?:\.\d+)?e-\d+|(?<=\|)\s*\d[\d,. +()x]*(?=\|)")
_TEST = re.compile(r"<!-- test:(\S+?)::(\w+) -->")


def pages() -> list[Path]:
    """README and docs, but for those that are generated as a whole."""
    return [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in _GENERATED)]


def filled(text: str) -> str:
    """A page with what its sources say now."""

    def fill(marked: re.Match[str]) -> str:
        kind, name, _ = marked.groups()
        if kind == "output":
            inside = f"\n```text\n{(FOLDER / f'{name}.txt').read_text(encoding='utf-8')}```\n"
        elif name in values():
            inside = values()[name]
        else:
            raise KeyError(f"There is no value {name!r}. There are {', '.join(values())}.")
        return f"<!-- {kind}:{name} -->{inside}<!-- /{kind} -->"

    return _MARKED.sub(fill, text)


def numbers_without_a_source(text: str) -> Iterator[str]:
    """The measured-looking numbers of a page that neither a marker nor a test has, with where they stand."""
    for sourced in _SOURCED:
        text = sourced.sub("", text)
    for paragraph in re.split(r"\n\s*\n|\n(?=\* )", text):
        if not _TEST.search(paragraph):
            yield from (f"{number.strip()!r} in {paragraph.strip()[:60]!r}" for number in _MEASURED.findall(paragraph))


def missing_tests(text: str) -> list[str]:
    """The tests that a page names and that do not exist."""
    named = _TEST.findall(text)
    return [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / file).exists() or f"def {name}(" not in (ROOT / file).read_text(encoding="utf-8")
    ]


def main() -> None:
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
