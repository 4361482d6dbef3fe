"""Where the Hydra configurations are."""

from __future__ import annotations

from pathlib import Path

__all__ = ["conf_dir", "names_of"]


def conf_dir() -> Path:
    """The folder of the Hydra configurations.

    An installed wheel carries them inside the package; in a checkout they lie beside it.

    Raises:
        FileNotFoundError: They are in neither place.
    """
    package = Path(__file__).resolve().parent
    candidates = [package / "conf", package.parent / "conf"]
    for candidate in candidates:
        if (candidate / "config.yaml").is_file():
            return candidate
    places = " or ".join(str(candidate) for candidate in candidates)
    raise FileNotFoundError(f"No config.yaml in {places}; the installation of lightning_mst is incomplete.")


def names_of(group: str) -> list[str]:
    """The choices of a group, such as ``"model"``; those that begin with an underscore are parts of others."""
    return sorted(path.stem for path in (conf_dir() / group).glob("[!_]*.yaml"))
