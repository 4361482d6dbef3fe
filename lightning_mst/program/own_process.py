"""A sweep's job as a program of its own, for strategies that start processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException

from lightning_mst.program.errors import ConfigurationError
from lightning_mst.program.results import read_result

__all__ = ["JobFailed", "needs_own_process", "run_in_own_process"]

# By these, Lightning and torch tell the processes of one run from another. None may reach the next job.
RANK_VARIABLES = (
    "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "PL_GLOBAL_SEED", "PL_SEED_WORKERS",
)  # fmt: skip
# What of Hydra's own settings is about the sweep, not about a job.
SWEEP_SETTINGS = ("hydra.mode", "hydra.sweep", "hydra/sweeper", "hydra.sweeper", "hydra/launcher", "hydra.launcher")
# Seconds that an interrupted run gets to end by itself.
PATIENCE = 10.0


class JobFailed(CompactHydraException):
    """A run in a process of its own failed. Hydra prints no stack trace: the run has shown its own."""


def needs_own_process(trainer: pl.Trainer) -> bool:
    """Whether a sweep's job starts processes: those repeat the command line, which must not be that of the sweep.

    Raises:
        ConfigurationError: Something else (torchrun, srun) starts the processes, so that each would do the whole sweep.
    """
    if trainer.strategy.launcher is None and trainer.world_size == 1:
        return False
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.world_size > 1 and environment is not None and environment.creates_processes_externally:
        raise ConfigurationError(
            f"trainer: The {trainer.world_size} processes of a sweep's job are started by the sweep, but"
            f" {type(environment).__name__} finds them started already. Run `lightning-mst train -m` without"
            " torchrun or srun, or run the jobs one by one"
        )
    return True


def run_in_own_process(folder: Path) -> dict[str, Any]:
    """Run the job of a sweep that Hydra has just composed as a single run, and return its result.

    Args:
        folder: The job's ``output_dir``.

    Raises:
        JobFailed: It ended with an error. If the run could still write it, the folder's ``result.json`` has it, too.
    """
    hydra = HydraConfig.get()
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    code = run_group(command_of(hydra, folder), environment, cwd=hydra.runtime.cwd)
    result = read_result(folder)
    if code != 0 or result is None or result["status"] != "completed":
        error = (result or {}).get("error") or f"it ended with code {code}"
        raise JobFailed(f"Run {hydra.job.num}: {error}")
    return result


def command_of(hydra: HydraConf, folder: Path) -> list[str]:
    """The command line that composes and runs what a sweep has composed for one job.

    Args:
        hydra: Hydra's configuration in the job.
        folder: The job's ``output_dir``.
    """
    sources = {source.provider: source.path for source in hydra.runtime.config_sources}
    where = ["--config-name", str(hydra.job.config_name), "--config-path", sources["main"]]
    if "command-line" in sources:
        where += ["--config-dir", sources["command-line"]]
    own_settings = [setting for setting in hydra.overrides.hydra if not setting.lstrip("+~").startswith(SWEEP_SETTINGS)]
    settings = [
        f"hydra.run.dir={_quoted(hydra.runtime.output_dir)}",
        f"hydra.job.num={hydra.job.num}",
        "hydra.output_subdir=null",  # the sweep has written it
    ]
    if folder != Path(hydra.runtime.output_dir):
        settings.append(f"output_dir={_quoted(str(folder))}")
    return [
        sys.executable, "-m", "lightning_mst", "train", *where, *hydra.overrides.task, *own_settings, *settings
    ]  # fmt: skip


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def run_group(command: Sequence[str], environment: Mapping[str, str], *, cwd: str) -> int:
    """Run a program, and leave none of the processes that it started behind, however it or this one ends.

    Returns:
        The exit code.
    """
    with (
        _signals_as_exit(),
        # A session of its own has a process group of its own, which all that it starts belongs to.
        subprocess.Popen(command, env=dict(environment), cwd=cwd, start_new_session=True) as process,
    ):
        try:
            return process.wait()
        except BaseException:
            # What Ctrl+C would have sent in the terminal: Lightning closes its loggers and saves what it was told to.
            _signal_group(process, signal.SIGINT)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
        finally:
            if sys.platform != "win32":
                _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    if sys.platform == "win32":
        process.terminate()
        return
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # all have ended
        return


@contextmanager
def _signals_as_exit() -> Iterator[None]:
    """Turn the signals that end a program into an exit, which lets it clean up."""
    if threading.current_thread() is not threading.main_thread():  # Python allows it there only
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if sys.platform != "win32" else [])]
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
