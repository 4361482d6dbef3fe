import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_mst.data import Documents, load_documents
from lightning_mst.data import documents as documents_module


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Write a standard library of our own and let the interpreter point to it."""
    root = tmp_path / "lib"

    def write(files: dict[str, bytes]) -> Path:
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        return root

    monkeypatch.setattr(documents_module.sysconfig, "get_path", lambda name: str(root))
    return write


def test_stdlib_gives_the_text_of_modules_and_of_pydoc_topics():
    import string
    from pydoc_data.topics import topics

    documents = load_documents("stdlib")
    texts = list(documents)
    assert len(documents) == len(texts) > 100
    assert Path(string.__file__).read_text(encoding="utf-8") in texts
    assert topics["with"] in texts
    assert sum(map(len, texts)) > 3_000_000
    assert documents.fingerprint == load_documents("stdlib").fingerprint


def test_stdlib_is_in_the_order_of_relative_paths(library):
    library({"z.py": b"z = 1", "a/b.py": b"b = 1", "a.py": b"a = 1"})
    modules = [text for text in load_documents("stdlib") if text.endswith("= 1")]
    assert modules == ["a = 1", "b = 1", "z = 1"]


def test_stdlib_leaves_out_tests_installed_packages_and_what_is_not_text(library):
    library(
        {
            "kept.py": b"kept = 1",
            "empty.py": b"\n",
            "latin.py": b"x = '\xe9' # bad = 1",
            "data.json": b"bad = 1",
            "site-packages/a.py": b"bad = 1",
            "dist-packages/a.py": b"bad = 1",
            "test/a.py": b"bad = 1",
            "json/tests/a.py": b"bad = 1",
            "idlelib/idle_test/a.py": b"bad = 1",
            "pydoc_data/topics.py": b"bad = 1",
        }
    )
    texts = list(load_documents("stdlib"))
    assert "kept = 1" in texts
    assert not any("bad = 1" in text for text in texts)
    assert all(text.strip() for text in texts)


def test_stdlib_without_source_files_is_a_clear_error(library, tmp_path):
    library({"only.pyc": b"\0"})
    with pytest.raises(FileNotFoundError, match=r"holds none.*source='text'"):
        load_documents("stdlib")


def test_text_folder_gives_each_txt_file_at_any_depth_as_a_document(text_folder, stories):
    (text_folder / "notes.md").write_text("not asked for")
    (text_folder / "empty.txt").write_text("\n")
    assert sorted(load_documents("text", paths=str(text_folder))) == sorted(stories)


def test_text_reads_globs_and_named_files_once_each_in_the_order_given(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    paths = [str(tmp_path / "c.md"), str(tmp_path / "*.txt"), str(tmp_path / "a.txt")]
    assert list(load_documents("text", paths=paths)) == ["c.md", "a.txt", "b.txt"]


def test_text_drops_a_byte_order_mark_and_keeps_unicode(tmp_path):
    (tmp_path / "a.txt").write_bytes("\N{BOM}größe 漢字 🦊".encode())
    assert list(load_documents("text", paths=str(tmp_path / "a.txt"))) == ["größe 漢字 🦊"]


def test_a_home_folder_sign_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "a.txt").write_text("here")
    assert list(load_documents("text", paths="~/a.txt")) == ["here"]


def test_jsonl_gives_each_row_as_a_document(write_jsonl, stories):
    path = write_jsonl(stories, column="body")
    assert list(load_documents("jsonl", paths=str(path), text_column="body")) == stories


def test_jsonl_reads_files_whose_names_look_like_patterns(write_jsonl, stories):
    path = write_jsonl(stories, file="part [1].jsonl")
    assert list(load_documents("jsonl", paths=str(path))) == stories


def test_a_null_row_is_a_document_without_text(write_jsonl):
    assert list(load_documents("jsonl", paths=str(write_jsonl(["a", None, "b"])))) == ["a", "", "b"]


def test_parquet_gives_each_row_as_a_document(tmp_path, stories):
    import datasets

    datasets.Dataset.from_dict({"text": stories}).to_parquet(tmp_path / "rows.parquet")
    assert list(load_documents("parquet", paths=[str(tmp_path)])) == stories


def test_hub_loads_a_split_of_a_data_set(write_jsonl, tmp_path, stories):
    write_jsonl(stories[:30], file="set/train.jsonl")
    write_jsonl(stories[30:], file="set/validation.jsonl")
    path = str(tmp_path / "set")
    assert list(load_documents("hub", path=path)) == stories[:30]
    assert list(load_documents("hub", path=path, split="validation")) == stories[30:]
    assert list(load_documents("hub", path=path, split="train[:2]")) == stories[:2]


def test_hub_loads_a_named_configuration(write_jsonl, tmp_path, stories):
    write_jsonl(stories[:5], file="set/small/train.jsonl")
    write_jsonl(stories, file="set/large/train.jsonl")
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files: small/*.jsonl\n"
        "- config_name: large\n  data_files: large/*.jsonl\n---\n"
    )
    assert list(load_documents("hub", path=str(tmp_path / "set"), name="small")) == stories[:5]


def test_fingerprint_follows_the_content(write_jsonl, stories):
    texts = Documents.from_texts(stories)
    assert texts.fingerprint == Documents.from_texts(list(stories)).fingerprint
    assert texts.fingerprint != Documents.from_texts(stories[::-1]).fingerprint
    assert Documents.from_texts(["ab", "c"]).fingerprint != Documents.from_texts(["a", "bc"]).fingerprint

    path = str(write_jsonl(stories))
    rows = load_documents("jsonl", paths=path).fingerprint
    assert rows == load_documents("jsonl", paths=path).fingerprint
    changed = load_documents("jsonl", paths=str(write_jsonl(stories[1:]))).fingerprint
    assert changed != rows


@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_selection_gives_the_documents_in_the_order_asked_for(source, write_jsonl, text_folder, stories):
    paths = str(text_folder if source == "text" else write_jsonl(stories))
    documents = load_documents(source, paths=paths)
    texts = list(documents)
    selected = documents.select(np.array([7, 2, 30]))
    assert len(selected) == 3
    assert list(selected) == [texts[7], texts[2], texts[30]]
    assert list(selected.select(np.array([2]))) == [texts[30]]
    assert selected.fingerprint == documents.select(np.array([7, 2, 30])).fingerprint
    assert selected.fingerprint != documents.select(np.array([2, 7, 30])).fingerprint


def test_unknown_source_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'csv'.*stdlib, text, jsonl, parquet, hub"):
        load_documents("csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "text"}, "needs paths"),
        ({"source": "jsonl", "paths": []}, "needs paths"),
        ({"source": "hub"}, "needs path"),
        ({"source": "stdlib", "paths": "a.txt"}, r"does not read paths.*a\.txt"),
        ({"source": "hub", "path": "a", "paths": ["b"]}, "does not read paths"),
        ({"source": "text", "paths": "a.txt", "path": "b"}, "does not read path,.*source='hub'"),
    ],
)
def test_arguments_that_do_not_fit_the_source_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_documents(**arguments)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*missing\.txt"):
        load_documents("text", paths=str(tmp_path / "missing.txt"))


def test_glob_that_matches_nothing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"The glob .*\*\.txt' matches no file"):
        load_documents("text", paths=str(tmp_path / "*.txt"))


def test_folder_without_fitting_files_says_what_was_looked_for(tmp_path):
    (tmp_path / "a.md").write_text("text")
    with pytest.raises(FileNotFoundError, match=r"holds no \.txt file"):
        load_documents("text", paths=str(tmp_path))


def test_empty_file_is_named(tmp_path):
    (tmp_path / "full.txt").write_text("text")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"empty\.txt' is empty"):
        load_documents("text", paths=[str(tmp_path / "full.txt"), str(tmp_path / "empty.txt")])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl' is empty"):
        load_documents("jsonl", paths=str(tmp_path / "empty.jsonl"))


def test_folder_of_empty_files_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"All 1 files of paths=.* are empty"):
        load_documents("text", paths=str(tmp_path))


def test_data_set_without_rows_is_an_error(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string")})
    datasets.Dataset.from_dict({"text": []}, features=features).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"cannot read .*none\.parquet.*has rows"):
        load_documents("parquet", paths=str(tmp_path / "none.parquet"))


def test_split_without_rows_is_an_error(write_jsonl, tmp_path, stories):
    write_jsonl(stories, file="set/train.jsonl")
    with pytest.raises(ValueError, match=r"cannot load split='train\[:0\]' of path=.*no data"):
        load_documents("hub", path=str(tmp_path / "set"), split="train[:0]")


def test_missing_text_column_lists_the_columns(write_jsonl, stories):
    path = write_jsonl(stories, column="body")
    with pytest.raises(ValueError, match=r"no column 'text'; its columns are \['body', 'id'\].*text_column"):
        load_documents("jsonl", paths=str(path))


def test_text_column_that_holds_no_strings_is_refused(write_jsonl, stories):
    with pytest.raises(ValueError, match="'id' holds int64, not strings"):
        load_documents("jsonl", paths=str(write_jsonl(stories)), text_column="id")


def test_broken_jsonl_names_the_file(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"cannot read .*broken\.jsonl"):
        load_documents("jsonl", paths=str(tmp_path / "broken.jsonl"))


def test_broken_parquet_names_the_file(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"not a parquet file")
    with pytest.raises(ValueError, match=r"cannot read .*broken\.parquet"):
        load_documents("parquet", paths=str(tmp_path / "broken.parquet"))


def test_text_that_is_not_utf8_names_the_file(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt' is not UTF-8 .*at byte 3"):
        load_documents("text", paths=str(tmp_path / "latin.txt"))


@pytest.mark.parametrize(
    ("source", "name", "advice"),
    [
        ("text", "a.jsonl", "set source='jsonl'"),
        ("text", "a.parquet", "set source='parquet'"),
        ("text", "a.txt.gz", "convert it"),
        ("jsonl", "a.txt", "convert it"),
        ("parquet", "a.json", "set source='jsonl'"),
    ],
)
def test_file_type_that_does_not_fit_the_source_says_what_to_do(tmp_path, source, name, advice):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"{name}': {advice}"):
        load_documents(source, paths=str(tmp_path / name))


def test_missing_data_set_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data set under path='.*nothing'"):
        load_documents("hub", path=str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match=r"no data set under path='nobody/nothing'"):
        load_documents("hub", path="nobody/nothing")


def test_unknown_split_lists_the_known_ones(write_jsonl, tmp_path, stories):
    write_jsonl(stories, file="set/train.jsonl")
    with pytest.raises(ValueError, match=r"split='dev'.*Unknown split.*train"):
        load_documents("hub", path=str(tmp_path / "set"), split="dev")


def test_unknown_configuration_lists_the_known_ones(write_jsonl, tmp_path, stories):
    write_jsonl(stories, file="set/train.jsonl")
    with pytest.raises(ValueError, match=r"name='large'.*default"):
        load_documents("hub", path=str(tmp_path / "set"), name="large")


@pytest.mark.parametrize("source", ["jsonl", "hub"])
def test_without_datasets_the_error_says_what_to_install(source, write_jsonl, stories, monkeypatch):
    path = str(write_jsonl(stories))
    monkeypatch.setitem(sys.modules, "datasets", None)
    arguments = {"path": path} if source == "hub" else {"paths": path}
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-mst\[data\]'"):
        load_documents(source, **arguments)
