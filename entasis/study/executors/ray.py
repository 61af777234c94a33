"""Runs as tasks of a Ray cluster (the extra `ray`).

entasis study run FILE --launcher ray --option address=auto --option gpus=1

Options: `address` of a cluster (left out, one is started on this machine), `cpus` and `gpus` that a run takes.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from entasis.errors import UserError
from entasis.study.executors.launchers import ATTEMPTS, Answer, Pool, launcher
from entasis.study.executors.local import cores, threads_of_a_run

_OPTIONS = ("address", "cpus", "gpus")


class _Job:
    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def poll(self) -> Answer | None:
        import ray

        if not ray.wait([self.reference], timeout=0)[0]:
            return None
        try:
            return "value", ray.get(self.reference)
        except ray.exceptions.RayError as error:
            return "lost", f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"

    def cancel(self) -> None:
        import ray

        ray.cancel(self.reference, force=False)


class _Cluster:
    at_once: int | None = None  # Ray starts as many tasks as it has room for
    alike, attempts, waits = 1, ATTEMPTS, False

    def __init__(self, cpus: float, gpus: float) -> None:
        self.cpus, self.gpus = cpus, gpus
        self.shares_gpus = 0 < gpus < 1

    def submit(self, name: str, function: Callable[..., Any], *arguments: Any) -> _Job:
        import ray

        # A lost task is sent again by the study, which counts; max_calls gives every run a process of its own.
        task = ray.remote(
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            max_retries=0,
            max_calls=1,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(max(1, int(self.cpus)))}},
        )(function)
        return _Job(task.options(name=name).remote(*arguments))


@launcher("ray")
@contextlib.contextmanager
def on_ray(logs: Path, threads: int | None, options: Mapping[str, str]) -> Iterator[Pool]:
    """Tasks of `threads` CPU cores each. Raises `UserError` without Ray, with a wrong option or no cluster."""
    try:
        import ray
    except ImportError as error:
        raise UserError("--launcher ray needs the extra ray (pip install 'entasis[ray]')") from error
    for name in options:
        if name not in _OPTIONS:
            raise UserError(f"--option {name}: Ray takes {', '.join(_OPTIONS)}")
    cpus = _amount("cpus", options.get("cpus", str(threads_of_a_run(threads))))
    gpus = _amount("gpus", options["gpus"]) if "gpus" in options else None
    here = "address" not in options
    try:
        ray.init(
            address=None if here else options["address"],
            num_cpus=cores() if here else None,
            include_dashboard=False if here else None,
            log_to_driver=False,
            # Workers find the modules that this process finds.
            runtime_env={"env_vars": {"PYTHONPATH": ":".join(p for p in sys.path if p)}},
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--launcher ray: {' '.join(str(error).split())[:200]}") from error
    try:
        available = ray.cluster_resources()
        yield _Cluster(cpus, float(bool(available.get("GPU"))) if gpus is None else gpus)
    finally:
        ray.shutdown()


def _amount(option: str, given: str) -> float:
    """How much of a machine a run takes. Raises `UserError`."""
    try:
        amount = float(given)
    except ValueError:
        amount = math.nan
    if not 0 <= amount < math.inf:
        raise UserError(f"--option {option}={given}: a number, at least 0")
    if option == "gpus" and amount > 1 and not amount.is_integer():
        raise UserError(f"--option gpus={given}: whole GPUs, or a part of one")
    return amount
