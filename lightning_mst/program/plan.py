"""``lightning-mst plan``: how long sequences may be on a device, and what fills its memory. No GPU is needed."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mst.program.plan_arguments import DEFAULT_MEMORY, DEFAULT_OUTPUT, STDOUT, Arguments, parse
from lightning_mst.units import parse_bytes

if TYPE_CHECKING:
    from lightning_mst.program.plan_config import Run

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments after ``plan``.

    Raises:
        SystemExit: 1 if there can't be a plan, 2 if the command line is wrong.
    """
    arguments = parse(argv)
    # Only now, so that help is quick.
    from hydra.errors import HydraException

    from lightning_mst.program.logs import tidy_lightning_output

    tidy_lightning_output()
    # What bitsandbytes says of the CPU, which only stands in for the GPU here.
    warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if arguments.measure:
            from lightning_mst.program.plan_measure import measure

            measure(arguments)
        else:
            _plan(arguments)
    except (HydraException, ValueError, OSError, ModuleNotFoundError) as error:
        print(f"lightning-mst plan: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def _plan(arguments: Arguments) -> None:
    from rich.console import Console

    from lightning_mst.memory.planner import plan_setting
    from lightning_mst.memory.rungs import LADDER, with_optimizer_on_host
    from lightning_mst.memory.setting import Setting
    from lightning_mst.program.plan_config import compose_runs, mst_config, read_run
    from lightning_mst.program.plan_table import show

    to_stdout = arguments.json == STDOUT
    output = arguments.output or (None if to_stdout else DEFAULT_OUTPUT)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    configs = compose_runs(LADDER if arguments.ladder else arguments.settings, arguments.overrides)
    settings = {name: mst_config(config) for name, config in configs.items()}
    run = read_run(next(iter(configs.values())))
    memory, memory_of = _device_memory(arguments.memory, run)
    with Console(stderr=True).status(f"Planning {run.model}"), _advice(run):
        plan = plan_setting(
            run.model,
            Setting(run.build_model, run.training),
            memory,
            settings,
            host_memory=arguments.host_memory,
            batch_size=run.batch_size,
            sequence_length=arguments.length,
            on_host=with_optimizer_on_host(run.build_model, run.training) if arguments.ladder else None,
        )
    report = {**plan.as_dict(), **run.as_dict(), "device_memory_of": memory_of, "ladder": arguments.ladder}
    numbers = json.dumps(report, indent=2) + "\n"
    if to_stdout:
        print(numbers, end="")
    else:
        show(report)
    if arguments.json is not None and not to_stdout:
        Path(arguments.json).write_text(numbers, encoding="utf-8")
    if output is not None:
        (output / "plan.json").write_text(numbers, encoding="utf-8")
        written = f"Written to {output}: plan.json{_draw(report, output / 'plan.png')}"
        print(written, file=sys.stderr if to_stdout else sys.stdout)


def _device_memory(asked: int | None, run: Run) -> tuple[int, str]:
    """Bytes of each device, and whose they are."""
    from lightning_mst.program.plan_config import total_memory

    if asked is not None:
        return asked, "--memory"
    found = total_memory(run.training.device)
    return found or (parse_bytes(DEFAULT_MEMORY), "the default, as no GPU is here; --memory sets another")


@contextmanager
def _advice(run: Run) -> Iterator[None]:
    """Adds to the bad news what could be asked for instead."""
    from lightning_mst.memory.planner import TooLarge

    try:
        yield
    except TooLarge as error:
        raise ValueError(f"{error}\n{run.smaller()}") from error


def _draw(report: dict[str, Any], path: Path) -> str:
    """Draws the figure, if that is possible, and says so."""
    try:
        from lightning_mst.program.ladder_plot import plot_ladder
        from lightning_mst.program.plan_plot import plot_plan
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        return "\nNo figure without matplotlib: pip install 'lightning-mst[plots]'"
    (plot_ladder if report["ladder"] else plot_plan)(report, path)
    return f", {path.name}"
