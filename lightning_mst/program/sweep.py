"""One table over all runs of a sweep."""

from __future__ import annotations

import csv
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_mst.program.results import read_result, write_failure
from lightning_mst.program.tables import number, print_table

__all__ = ["MEASUREMENTS", "SweepTable", "read_overrides", "read_sweep", "swept_keys"]

log = logging.getLogger(__name__)

# Keys of result.json -> the column's title and the digits to show.
MEASUREMENTS = {
    "loss": ("loss", 4),
    "val_perplexity": ("val perplexity", 2),
    "tokens_per_second": ("tokens/s", 0),
    "peak_memory_gib": ("peak GiB", 3),
}


class SweepTable(Callback):
    """A Hydra callback that leaves ``sweep.csv`` in the folder of a sweep, one row per run.

    1. A job that fails is written down as failed, with its error; the other jobs still run. (Without this, Hydra
       ends a sweep at the first failure and reports nothing about the rest.)
    2. When all jobs are done, the rows are read from the jobs' folders, so it does not matter which launcher ran
       them, or on which machine, as long as the folder is shared. A job that died without a word counts as failed.
    3. If any failed, the program ends with exit code 1.
    """

    def __init__(self) -> None:
        self._start = 0.0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember when this sweep began: an earlier one may have left runs in the same folder."""
        self._start = time.time()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Take down a failure, and let the sweep go on."""
        if config.hydra.mode != RunMode.MULTIRUN or job_return.status != JobStatus.FAILED:
            return
        error: BaseException = job_return._return_value  # `return_value` would raise it
        is_mistake = isinstance(error, CompactHydraException)
        log.error("This run failed: %s", error, exc_info=None if is_mistake else error)
        # A run that got as far as to begin has written its own.
        write_failure(Path(config.hydra.runtime.output_dir), f"{type(error).__name__}: {error}")
        # The error holds the stack, and the stack the model: it must not stay in memory while others are measured.
        job_return.status = JobStatus.COMPLETED
        job_return.return_value = None

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write and show the table.

        Raises:
            SystemExit: With code 1 if a run failed.
        """
        folder = Path(config.hydra.sweep.dir)
        rows = read_sweep(folder, since=self._start - 1)  # a second for file systems that round
        if not rows:
            log.warning("No sweep.csv: the runs left no .hydra folder in %s (hydra.output_subdir)", folder)
            return
        write_csv(folder / "sweep.csv", rows)
        show(folder, rows)
        failed = [row["run"] for row in rows if row["status"] != "completed"]
        if failed:
            print(f"{len(failed)} of {len(rows)} runs failed: {', '.join(failed)} in {folder}", file=sys.stderr)
            raise SystemExit(1)


def read_sweep(folder: Path, *, since: float = 0.0) -> list[dict[str, Any]]:
    """The rows of the table: ``run`` (its folder), the swept overrides, ``status``, the measurements, ``error``.

    Args:
        folder: The sweep's folder, with a folder per job in it.
        since: Leave out what was started earlier (seconds since the epoch).
    """
    jobs = []
    for path in folder.rglob(".hydra/overrides.yaml"):
        if path.stat().st_mtime < since:
            continue
        run = path.parent.parent
        result = read_result(run) or {}
        order = OmegaConf.select(OmegaConf.load(path.with_name("hydra.yaml")), "hydra.job.num", default=0)
        jobs.append((order, str(run.relative_to(folder)), read_overrides(path), result))
    jobs.sort(key=lambda job: job[:2])
    swept = swept_keys([overrides for _, _, overrides, _ in jobs])
    return [
        {
            "run": run,
            **{key: overrides.get(key) for key in swept},
            "status": result.get("status", "failed"),
            **{key: result.get(key) for key in MEASUREMENTS},
            "error": result.get("error"),
        }
        for _, run, overrides, result in jobs
    ]


def read_overrides(path: Path) -> dict[str, str]:
    """What an ``overrides.yaml`` of Hydra says: key -> value, in the order of the command line."""
    return dict(str(override).lstrip("+~").partition("=")[::2] for override in OmegaConf.load(path))


def swept_keys(jobs: Sequence[dict[str, str]]) -> list[str]:
    """The keys that jobs differ in, given the overrides of each; all keys if there is but one job."""
    keys = {key: None for overrides in jobs for key in overrides}  # a dict keeps the order
    return [key for key in keys if len(jobs) == 1 or len({overrides.get(key) for overrides in jobs}) > 1]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows that share their keys, numbers in full."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def show(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Print the rows, without the errors' texts and without what none of the runs measures."""
    unmeasured = [key for key in MEASUREMENTS if all(row[key] is None for row in rows)]
    keys = [key for key in rows[0] if key != "error" and key not in unmeasured]
    print_table(
        f"Sweep: {folder / 'sweep.csv'}",
        [MEASUREMENTS[key][0] if key in MEASUREMENTS else key for key in keys],
        [
            [number(row[key], MEASUREMENTS[key][1]) if key in MEASUREMENTS else str(row[key]) for key in keys]
            for row in rows
        ],
    )
    print(f"All results, with a picture: lightning-mst report {shlex.quote(str(folder))}")
