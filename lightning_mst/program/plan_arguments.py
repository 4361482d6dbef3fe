"""The command line of ``lightning-mst plan``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_mst.program.settings import add_settings, is_override, read_settings
from lightning_mst.units import parse_bytes

__all__ = ["DEFAULT_MEMORY", "DEFAULT_OUTPUT", "STDOUT", "Arguments", "parse"]

DEFAULT_RUNGS = ("off", "recompute", "paper", "auto")
DEFAULT_MEMORY = "80GiB"
DEFAULT_OUTPUT = Path("outputs", "plan")
STDOUT = "-"


@dataclass(frozen=True)
class Arguments:
    """A command line.

    Attributes:
        settings: Mini-sequence settings to plan.
        ladder: Plan those that lead to the longest sequences instead.
        memory: Bytes of each device; None: as much as the one that is there has.
        host_memory: Bytes of the host's memory for each device; None: not limited.
        length: A sequence length that is wanted, in tokens.
        output: Folder for the figure and the numbers.
        json: A file for the numbers, or ``"-"`` for stdout and nothing else there.
        measure: Run real steps, and compare.
        overrides: Hydra's.
    """

    settings: list[str]
    ladder: bool
    memory: int | None
    host_memory: int | None
    length: int | None
    output: Path | None
    json: str | None
    measure: bool
    overrides: list[str]


def parse(argv: Sequence[str]) -> Arguments:
    """Read a command line.

    Raises:
        SystemExit: 2, with what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-mst plan",
        description="Predict the peak memory of a training step, without a GPU and without a weight in memory,\n"
        "and find the longest sequence that fits under several mini-sequence settings. What is planned is\n"
        "the run that `lightning-mst train` with the same overrides would be.",
        epilog="examples:\n"
        "  lightning-mst plan model=llama3_8b precision=bf16-true optimizer=adamw_in_backward\n"
        "  lightning-mst plan --ladder --host-memory 512GiB model=llama3_8b precision=bf16-true "
        "optimizer=adamw_in_backward\n"
        "  lightning-mst plan --memory 24GiB --length 32768 model=hf model.name=my/local/folder precision=nf4-lora\n"
        "  lightning-mst plan --json model=llama3_8b precision=bf16-true strategy=mst_model_parallel trainer.devices=8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help=f"of each device: 80GiB, 24GB, ... (default: that of the GPU here, or else {DEFAULT_MEMORY})",
    )
    parser.add_argument(
        "--host-memory",
        metavar="SIZE",
        help="of the host, for each device: activations and optimizer states that are kept there fit into it "
        "(default: not limited, only stated)",
    )
    parser.add_argument(
        "--length", metavar="TOKENS", help="find the smallest numbers of mini-sequences that reach this length"
    )
    add_settings(parser, DEFAULT_RUNGS, "settings to plan", "Hydra overrides of the run that is planned, as for train")
    parser.add_argument(
        "--ladder",
        action="store_true",
        help="plan step by step what leads to the longest sequences, up to activations and the optimizer on the host, "
        "in place of --mst",
    )
    parser.add_argument(
        "--output", type=Path, help=f"folder for the figure and the numbers (default: {DEFAULT_OUTPUT})"
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="write the numbers to FILE; alone: to stdout, and no table",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="run real steps of a few of the model's layers here, at data.sequence_length or --length, and compare "
        "them with the prediction",
    )
    given = parser.parse_intermixed_args(argv)
    numbers, overrides = given.json, given.overrides
    if numbers is not None and is_override(numbers):  # argparse gives the one after --json to that
        numbers, overrides = STDOUT, [numbers, *overrides]
    settings, overrides = read_settings(parser, given.mst, overrides)
    if given.ladder and (given.measure or settings != list(DEFAULT_RUNGS)):
        parser.error("--ladder has settings of its own, and only predicts: drop it, or --mst and --measure")
    return Arguments(
        settings,
        given.ladder,
        _bytes(parser, "--memory", given.memory),
        _bytes(parser, "--host-memory", given.host_memory),
        _length(parser, given.length),
        given.output,
        numbers,
        given.measure,
        overrides,
    )


def _bytes(parser: argparse.ArgumentParser, option: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return parse_bytes(text)
    except ValueError as error:
        parser.error(f"{option}: {error}")


def _length(parser: argparse.ArgumentParser, text: str | None) -> int | None:
    if text is None:
        return None
    digits = text.replace(",", "").replace("_", "")
    length = int(digits) if digits.isdecimal() else 0
    if length < 2:
        parser.error(f"--length should be a whole number of tokens, 2 or more, got {text!r}")
    return length
