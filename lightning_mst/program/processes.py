"""One run in several processes: one of them tells what went wrong, and none outlives it."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import lightning.pytorch as pl
from filelock import FileLock
from hydra.errors import CompactHydraException
from lightning.pytorch.utilities import rank_zero_only
from torch.multiprocessing import ProcessRaisedException

from lightning_mst.data.cache import cache_key
from lightning_mst.program.results import read_result, write_failure

__all__ = ["RankFailed", "ending_together", "is_main_process", "one_at_a_time", "told_once"]

# Seconds that the main process has to tell of what all processes run into alike, before another one does.
GRACE = 3.0
# Seconds in which a process that died shows as dead, and in which one that failed gets its message out.
NOTICE, LAST_WORDS = 1.0, 10.0


class RankFailed(CompactHydraException):
    """Another process of the run failed. Hydra prints the message without a stack trace: that of the cause is above."""


def is_main_process() -> bool:
    """Whether this is the process of rank 0, or the only one."""
    return rank_zero_only.rank == 0


def one_at_a_time(folder: Path) -> AbstractContextManager[object]:
    """A lock that the processes of one user on one machine pass through one after another.

    Args:
        folder: What they would write to at the same time. It may be read-only: the lock itself lies elsewhere.
    """
    return FileLock(Path(tempfile.gettempdir()) / f"lightning_mst-{cache_key(Path.home(), folder.absolute())}.lock")


@contextmanager
def told_once(folder: Path) -> Iterator[None]:
    """Let one process of a run tell of a failure: on the terminal, and in the folder's ``result.json``.

    The main process tells of what happens to it, or to all alike (a wrong configuration). What happens to another
    process is told by that one, and those that fail in its wake leave quietly.

    Raises:
        SystemExit: With code 1, in place of an error that another process has told.
    """
    try:
        yield
    except Exception as error:
        if not is_main_process():
            _wait(lambda: read_result(folder) is not None, GRACE)
        told = not write_failure(folder, *_in_a_line(error))
        if told and not isinstance(error, RankFailed):
            raise SystemExit(1) from error
        raise


def _in_a_line(error: Exception) -> tuple[str, int]:
    """What happened, and the rank it happened to."""
    if isinstance(error, ProcessRaisedException):  # in a process that Lightning has spawned; the message is its stack
        return str(error).strip().splitlines()[-1], error.error_index
    return f"{type(error).__name__}: {error}", rank_zero_only.rank


@contextmanager
def ending_together(trainer: pl.Trainer, folder: Path) -> Iterator[None]:
    """In the main process, let a failure end the processes that Lightning has started, and find out whose it was.

    Raises:
        RankFailed: Another process failed first, so that what is raised here only follows from it.
    """
    try:
        yield
    except Exception as error:
        processes = _started_by(trainer)
        try:
            _wait(lambda: any(process.poll() for process in processes), NOTICE if processes else 0.0)
            failure = read_result(folder) if processes else None
            if failure is not None:
                _wait(lambda: processes[failure["rank"] - 1].poll() is not None, LAST_WORDS)
                raise RankFailed(f"Rank {failure['rank']} failed: {failure['error']}") from error
            for rank, process in enumerate(processes, start=1):
                if process.returncode:
                    raise RankFailed(f"Rank {rank} ended {_describe(process.returncode)}") from error
            raise
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _started_by(trainer: pl.Trainer) -> list[subprocess.Popen[bytes]]:
    """The processes of ranks 1, 2, ... that Lightning started with this command line."""
    launched = getattr(trainer.strategy.launcher, "procs", [])
    processes = [process for process in launched if isinstance(process, subprocess.Popen)]
    if processes:
        # Lightning's observer kills this process as soon as it sees one of them fail: it finds none to observe.
        launched.clear()
    return processes


def _describe(code: int) -> str:
    return f"with code {code}" if code > 0 else f"by signal {-code} without a word (out of memory?)"


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
