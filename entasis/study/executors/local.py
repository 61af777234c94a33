"""Runs on the machine at hand: worker processes on each GPU, or one on each share of the CPU cores.

entasis study run FILE --launcher local --option runs_per_gpu=8
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entasis.errors import UserError
from entasis.study.executors.launchers import Answer, Pool, launcher, whole
from entasis.study.executors.worker import Place, serve, train_one

_FORGETS = Path("/proc/self/clear_refs").exists()
"""Whether a process can forget the peak of its memory; else every run gets one of its own (`train.metrics.forget_peak`)."""


class _Worker:
    """A process at a place, which answers calls through a pipe."""

    def __init__(self, place: Place, logs: Path | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.place = place
        self.pipe, theirs = context.Pipe()
        log = str(logs / f"{place.name}.log") if logs else None
        self.process = context.Process(target=serve, args=(theirs, place, log), daemon=True, name=place.name)
        self.process.start()
        theirs.close()

    def ask(self, task: tuple[Callable[..., Any], tuple[Any, ...]] | None) -> None:
        with contextlib.suppress(OSError):  # one that has died is noticed by whoever waits for the answer
            self.pipe.send(task)

    def end(self, patience: float) -> str:
        """Ends it, by force after so many seconds; returns how it ended."""
        self.process.join(patience)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        code = self.process.exitcode or 0
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = "; the system may have run out of memory" if code == -signal.SIGKILL else ""
        return f"the worker process ended with {cause}{hint}"


@dataclass(slots=True)
class _Job:
    pool: _Places
    worker: _Worker
    keep: bool
    """Whether its worker does another call after this one."""

    def poll(self) -> Answer | None:
        try:
            # A pipe is ready with an answer, or because its worker has ended.
            if not self.worker.pipe.poll():
                return None
            answer: Answer = self.worker.pipe.recv()
        except (EOFError, OSError):
            answer = "lost", self.worker.end(5)
            self.pool.workers[self.worker.place] = None
        else:
            if not self.keep:
                self.worker.ask(None)
                self.worker.end(5)
                self.pool.workers[self.worker.place] = None
        self.pool.free.append(self.worker.place)
        return answer

    def cancel(self) -> None:
        if self.worker.process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.worker.process.pid, signal.SIGTERM)


class _Places:
    """A pool of the places of this machine, with a worker at each that is in use."""

    attempts = 1
    """A run that was killed here, for want of memory most likely, is not tried again at once."""
    waits = True

    def __init__(self, places: Sequence[Place], logs: Path | None) -> None:
        self.at_once: int | None = len(places)
        self.alike = len(places)
        gpus = [place.gpu for place in places]
        self.shares_gpus = len(set(gpus)) < len(gpus) and None not in gpus
        self.logs, self.free = logs, list(places)
        self.workers: dict[Place, _Worker | None] = dict.fromkeys(places)

    def submit(self, name: str, function: Callable[..., Any], *arguments: Any) -> _Job:
        place = self.free.pop(0)
        worker = self.workers[place] or _Worker(place, self.logs)
        self.workers[place] = worker
        worker.ask((function, arguments))
        # torch stays imported from run to run; what measuring has left in memory goes.
        return _Job(self, worker, keep=function is train_one and _FORGETS)

    def close(self) -> None:
        left = [worker for worker in self.workers.values() if worker]
        for worker in left:
            worker.ask(None)
        for worker in left:
            worker.end(2)


@contextlib.contextmanager
def pool_of(places: Sequence[Place], logs: Path | None = None) -> Iterator[Pool]:
    """A pool of these places; its workers end with it. What they print goes into `logs`."""
    pool = _Places(places, logs)
    try:
        yield pool
    finally:
        pool.close()


@launcher("local")
@contextlib.contextmanager
def on_this_machine(logs: Path, threads: int | None, options: Mapping[str, str]) -> Iterator[Pool]:
    """As many runs at once as there are GPUs, `runs_per_gpu` times, or shares of `threads` CPU cores.

    Raises `UserError` for another option.
    """
    if unknown := options.keys() - {"runs_per_gpu"}:
        raise UserError(f"--option {min(unknown)}: --launcher local knows runs_per_gpu alone")
    runs_per_gpu = whole("runs_per_gpu", options.get("runs_per_gpu", "1"))
    with pool_of(places(threads, runs_per_gpu), logs) as pool:
        yield pool


def places(threads: int | None, runs_per_gpu: int = 1) -> list[Place]:
    """So many places per CUDA device, else one per share of the CPU cores. Raises `UserError`."""
    import torch

    each = threads_of_a_run(threads)
    if runs_per_gpu > 1 and not torch.cuda.is_available():
        raise UserError(f"--option runs_per_gpu={runs_per_gpu}: torch sees no GPU here")
    if torch.cuda.is_available():
        return places_on_gpus(torch.cuda.device_count(), runs_per_gpu, each)
    return [Place(f"cpu-{i}", each) for i in range(cores() // each)]


def places_on_gpus(gpus: int, runs_per_gpu: int, threads: int) -> list[Place]:
    """Places in turn over the GPUs, with at most `threads` threads each and no more than there are cores."""
    count = gpus * runs_per_gpu
    return [Place(f"cuda-{i}", max(1, min(threads, cores() // count)), i % gpus) for i in range(count)]


def threads_of_a_run(wanted: int | None) -> int:
    """What the study says, else what the user has set by OMP_NUM_THREADS, else all cores of this machine."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return min(wanted or (int(given) if given.isdigit() and int(given) else cores()), cores())


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keeps a second call out of a study's folder while one is at work; says where it cannot. Raises `UserError`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder}: another `entasis study` is at work in this folder; wait for it"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            print(
                "note: this file system has no locks: take care that no other `entasis study` uses the folder",
                file=sys.stderr,
            )
        yield
