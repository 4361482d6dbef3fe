"""The part of a command line that ``compare`` and ``plan`` share: mini-sequence settings and Hydra overrides."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_mst.configurations import names_of

__all__ = ["add_settings", "is_override", "read_settings"]


def add_settings(parser: argparse.ArgumentParser, default: Sequence[str], settings: str, overrides: str) -> None:
    """Adds ``--mst NAME ...`` and the overrides; parse with ``parse_intermixed_args``.

    Args:
        parser: The command's.
        default: Names of files of the ``mst`` group.
        settings: What the settings are for, for the help.
        overrides: The same of the overrides.
    """
    choices = ", ".join(names_of("mst"))
    parser.add_argument(
        "--mst",
        nargs="+",
        default=list(default),
        metavar="NAME",
        help=f"{settings} (default: {' '.join(default)}; there are {choices})",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=overrides)


def read_settings(
    parser: argparse.ArgumentParser, mst: Sequence[str], overrides: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The settings and the overrides of a command line.

    Args:
        parser: Tells what is wrong.
        mst: What argparse gave to ``--mst``: of `--mst off auto data.sequence_length=4096` all three.
        overrides: What it took for overrides.

    Raises:
        SystemExit: 2, if a setting is unknown or missing or there twice, or an override is none.
    """
    settings = [name for name in mst if not is_override(name)]
    overrides = [name for name in mst if is_override(name)] + list(overrides)
    unknown = [name for name in settings if name not in names_of("mst")]
    if unknown and not any(override.startswith("hydra.searchpath") for override in overrides):
        parser.error(f"unknown --mst {', '.join(unknown)}; there are {', '.join(names_of('mst'))}")
    if not settings:
        parser.error("--mst needs the name of a setting")
    if len(set(settings)) < len(settings):
        parser.error("--mst names a setting twice")
    wrong = [override for override in overrides if not is_override(override)]
    if wrong:
        parser.error(f"not an override (key=value): {', '.join(wrong)}")
    if any(override.startswith("mst=") for override in overrides):
        parser.error("the mst group is what is compared: name its settings after --mst")
    return settings, overrides


def is_override(text: str) -> bool:
    """Whether an argument is a Hydra override."""
    return "=" in text or text.startswith("~")
