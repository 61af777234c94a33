"""Runs as SLURM jobs, through submitit (the extra `slurm`).

entasis study run FILE --launcher slurm --option slurm_partition=gpu --option gpus_per_node=1 --option timeout_min=600

Options are submitit's own parameters; besides them `cluster` (slurm, or local for processes on this machine) and
`at_once`, the most jobs that are with the scheduler at a time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from entasis.errors import Failure, UserError
from entasis.study.executors.launchers import ATTEMPTS, Answer, Pool, launcher, whole
from entasis.study.executors.local import cores, threads_of_a_run


class _Job:
    def __init__(self, job: Any) -> None:
        self.job = job

    def poll(self) -> Answer | None:
        import submitit

        if not self.job.done():
            return None
        try:
            return "value", self.job.result()
        except submitit.core.utils.UncompletedJobError as error:  # a failed job's error is one of these
            return "lost", " ".join(str(error).split())[:200]

    def cancel(self) -> None:
        self.job.cancel(check=False)


class _Slurm:
    alike, attempts, waits, shares_gpus = 1, ATTEMPTS, False, False

    def __init__(self, executor: Any, at_once: int | None) -> None:
        self.executor, self.at_once = executor, at_once

    def submit(self, name: str, function: Callable[..., Any], *arguments: Any) -> _Job:
        import submitit

        self.executor.update_parameters(name=f"entasis-{name.replace('/', '-')}")
        try:
            return _Job(self.executor.submit(function, *arguments))
        except submitit.core.utils.FailedJobError as error:  # sbatch itself said no
            raise Failure(
                f"--launcher slurm: {name} was not taken: {' '.join(str(error).split())[:200]}"
            ) from error


@launcher("slurm")
@contextlib.contextmanager
def slurm(logs: Path, threads: int | None, options: Mapping[str, str]) -> Iterator[Pool]:
    """Jobs of one task each, on `threads` CPU cores. Raises `UserError` without submitit or with a wrong option."""
    try:
        import submitit
    except ImportError as error:
        raise UserError("--launcher slurm needs the extra slurm (pip install 'entasis[slurm]')") from error
    wanted: dict[str, Any] = {
        k: int(v) if v.isascii() and v.isdigit() else v
        for k, v in options.items()
        if k not in ("cluster", "at_once")
    }
    cluster = options.get("cluster", "slurm")
    each = threads_of_a_run(threads)
    at_once = max(1, cores() // each) if cluster == "local" else None
    if "at_once" in options:
        at_once = whole("at_once", options["at_once"])
    try:
        executor = submitit.AutoExecutor(folder=logs / "slurm" / "%j", cluster=cluster)
        executor.update_parameters(**{"timeout_min": 24 * 60, "cpus_per_task": each, **wanted})
    except (RuntimeError, ValueError, TypeError, NameError, AssertionError) as error:
        raise UserError(f"--launcher slurm: {' '.join(str(error).split())}") from error
    # torch takes its number of threads from here; on this machine for `local`, with SLURM's export on the nodes.
    os.environ["OMP_NUM_THREADS"] = str(each)
    yield _Slurm(executor, at_once)
