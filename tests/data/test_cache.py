from pathlib import Path

import pytest

from lightning_mst.data.cache import atomic_path, cache_key, default_cache_dir


def test_default_folder_follows_xdg_cache_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "lightning_mst"


@pytest.mark.parametrize("value", [None, ""])
def test_default_folder_is_in_the_home_without_xdg_cache_home(monkeypatch, tmp_path, value):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert default_cache_dir() == tmp_path / ".cache" / "lightning_mst"


def test_key_depends_on_every_part_and_on_where_it_ends():
    keys = {cache_key("ab", "c"), cache_key("a", "bc"), cache_key("abc"), cache_key("ab", "c", None)}
    assert len(keys) == 4
    assert cache_key("ab", 3) == cache_key("ab", 3)


def test_target_appears_only_when_writing_succeeded(tmp_path):
    target = tmp_path / "new" / "file"

    def write_half() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_half()
    assert list(target.parent.iterdir()) == []

    with atomic_path(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


def test_two_writers_of_one_target_do_not_clash(tmp_path):
    target = tmp_path / "file"
    with atomic_path(target) as first, atomic_path(target) as second:
        first.write_text("same")
        second.write_text("same")
    assert target.read_text() == "same"
    assert list(tmp_path.iterdir()) == [target]
