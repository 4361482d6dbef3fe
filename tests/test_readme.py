"""What the README shows is what was measured and what the repository holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.tables import README, ROOT, markdown, result_file, sections

TEXT = README.read_text(encoding="utf-8")


@pytest.mark.parametrize("section", sections(TEXT))
def test_the_benchmark_tables_are_those_of_the_result_files(section):
    result = json.loads(result_file(section).read_text())
    assert f"<!-- benchmark:{section} -->\n{markdown(result)}<!-- /benchmark:{section} -->" in TEXT


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", TEXT))))
def test_every_link_inside_the_repository_leads_somewhere(target):
    assert (Path(ROOT) / target).exists()


@pytest.mark.parametrize("group", ["model", "mst", "strategy", "precision", "data", "optimizer", "experiment"])
def test_every_choice_of_the_configuration_is_listed(group):
    for file in (ROOT / "conf" / group).glob("[!_]*.yaml"):
        assert f"`{file.stem}`" in TEXT, f"{group}={file.stem} is not in the README"
