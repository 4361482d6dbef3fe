"""What README and docs show is what was measured and what the repository holds."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

from benchmarks.pages import filled, missing_tests, numbers_without_a_source, pages
from benchmarks.tables import README, ROOT, markdown, result_file, sections
from benchmarks.values import values

TEXT = README.read_text(encoding="utf-8")
PROGRAM = (ROOT / "docs" / "program.md").read_text(encoding="utf-8")
MESSAGES = re.findall(
    r"```text\n(.*?)```", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.DOTALL
)


@pytest.mark.parametrize("section", sections(TEXT))
def test_the_benchmark_tables_are_those_of_the_result_files(section):
    result = json.loads(result_file(section).read_text())
    assert f"<!-- benchmark:{section} -->\n{markdown(result)}<!-- /benchmark:{section} -->" in TEXT


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_number_of_a_page_is_that_of_its_source(page):
    text = page.read_text(encoding="utf-8")
    assert filled(text) == text, "run `make pages`"
    assert list(numbers_without_a_source(text)) == []
    assert missing_tests(text) == []
    assert not re.search(r"^<!-- value:", text, re.MULTILINE), "such a line is no text, as it begins with a comment"


def test_a_number_without_a_source_is_found_and_one_with_a_source_is_not():
    text = "Takes 0.33x of it.\n\n| a | 12 |\n|---|---|\n| b | 3.67 |\n\nWith M = 8, `1.5x` and 2 modules."
    assert [found.split(" in ")[0] for found in numbers_without_a_source(text)] == ["'0.33x'", "'12'", "'3.67'"]
    held = "Exact to 1e-10. <!-- test:tests/test_readme.py::test_of_nothing -->"
    assert list(numbers_without_a_source(held)) == []
    assert missing_tests(held) == ["tests/test_readme.py::test_of_nothing"]
    assert filled("x <!-- value:mlp_chunk -->7<!-- /value -->").endswith("-->1,024 tokens<!-- /value -->")


@pytest.mark.parametrize(
    "page", [*pages(), ROOT / "examples" / "README.md"], ids=lambda page: f"{page.parent.name}/{page.name}"
)
def test_every_link_inside_the_repository_leads_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not heading or heading in _headings(file), target


def _headings(page: Path) -> list[str]:
    """The anchors that GitHub and Sphinx make of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("group", ["model", "mst", "strategy", "precision", "data", "optimizer"])
def test_every_choice_of_the_configuration_is_listed(group):
    for file in (ROOT / "conf" / group).glob("[!_]*.yaml"):
        assert f"`{file.stem}`" in PROGRAM, f"{group}={file.stem} is not in docs/program.md"


def test_every_experiment_is_listed():
    listed = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    names = {file.stem for file in (ROOT / "conf" / "experiment").rglob("[!_]*.yaml")}
    assert {name for name in names if f"`{name}`" not in listed} == set()


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:40].strip())
def test_every_message_of_the_troubleshooting_page_is_in_the_source(message):
    parts = [part for part in re.sub(r"\s+", " ", message).strip().split("...") if len(part.strip()) > 3]
    assert parts
    assert any(all(part.strip() in text for part in parts) for text in _texts_of_the_source())


def test_the_recorded_loss_curves_with_and_without_mini_sequences_are_within_1e_4():
    assert float(values()["convergence_difference"]) < 1e-4
    assert int(values()["convergence_steps"].split()[0]) >= 300


@cache
def _texts_of_the_source() -> list[str]:
    """Every string of the package, with a mark where a value is put in."""
    found = []
    for file in (ROOT / "lightning_mst").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "{}" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found
