"""Runs what is planned: one worker process per free place, failures kept apart, everything resumable."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from entasis import signals
from entasis.errors import DiskFull, Failure, UserError
from entasis.files import write_text
from entasis.study.plan import PlannedRun
from entasis.study.worker import Place, occupy, serve

T = TypeVar("T")
_REUSED = Path("/proc/self/clear_refs").exists()
"""Whether a process can forget the peak of its memory; else every run gets one of its own (`train.metrics.reset_peak_memory`)."""


@dataclass(slots=True)
class State:
    """Where a run is, for whoever shows it."""

    run: PlannedRun
    status: str = "waiting"
    """waiting, running, done, failed."""
    step: int = 0
    steps: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    message: str = ""
    doing: str = ""

    @property
    def fraction(self) -> float:
        return 1.0 if self.status in ("done", "failed") else self.step / self.steps if self.steps else 0.0


@dataclass(slots=True)
class _Worker:
    place: Place
    process: BaseProcess
    pipe: Connection
    state: State | None = None


Watcher = Callable[[Sequence[State]], None]


def places(threads: int | None, runs: int) -> list[Place]:
    """One place per CUDA device, else one per share of the CPU cores; never more than there are runs."""
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return [Place(f"cuda-{i}", max(1, cores() // count), i) for i in range(min(count, runs))]
    each = min(threads or cores(), cores())
    return [Place(f"cpu-{i}", each) for i in range(min(cores() // each, max(1, runs)))]


def on_each(where: Sequence[Place], function: Callable[..., T], *arguments: Any) -> list[T]:
    """What `function` returns in a process of its own at each place, all at once. Raises `Failure` when one dies."""
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = [
            stack.enter_context(ProcessPoolExecutor(1, context, initializer=occupy, initargs=(place,)))
            for place in where
        ]
        calls = [pool.submit(function, *arguments) for pool in pools]
        try:
            return [call.result() for call in calls]
        except BrokenProcessPool as error:
            raise Failure(
                "a process that was measuring died; the system may have run out of memory"
            ) from error


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keeps a second call out of a study's folder while one is at work. Raises `UserError`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{folder}: another `entasis study` is at work in this folder; wait for it"
            ) from error
        yield


def failure_note(folder: Path, run: PlannedRun) -> Path:
    """The file beside a run's folder that says why it failed."""
    place = folder / run.folder
    return place.with_name(place.name + ".failure.txt")


def finished(folder: Path, run: PlannedRun) -> bool:
    """Whether a run has its result."""
    return (folder / run.folder / "result.json").is_file()


def execute(folder: Path, runs: Sequence[PlannedRun], where: Sequence[Place], watch: Watcher) -> list[State]:
    """Trains every run that has no result yet. A failed one is noted in its folder and stops no other.

    `watch` is called some four times a second with the states of all runs. Asked to stop (Ctrl-C, SIGTERM), and on a
    disk too full to note a failure, running ones save a checkpoint, for as long as that takes, and `Failure` is
    raised; the same call later goes on from there. A second request later waits for nothing.
    """
    states = [State(run, "done" if finished(folder, run) else "waiting") for run in runs]
    queue = [s for s in states if s.status == "waiting"]
    workers: list[_Worker] = []
    with signals.requested() as asked:
        try:
            workers += [_start(place, folder) for place in where[: len(queue)]]
            shown = 0.0
            while (queue or any(w.state for w in workers)) and not asked.is_set():
                for worker in workers:
                    if worker.state is None and queue:
                        _give(worker, queue.pop(0), folder)
                # A pipe is ready with messages, or because its worker has ended.
                ready = connection.wait([w.pipe for w in workers], timeout=0.25)
                for worker in [w for w in workers if w.pipe in ready]:
                    if not _listen(worker, folder):
                        _mourn(worker, folder)
                        workers.remove(worker)
                        if queue:
                            workers.append(_start(worker.place, folder))
                if time.monotonic() - shown > 0.25:
                    shown = time.monotonic()
                    watch(states)
            if asked.is_set():
                raise _stopped(f"stopped by {asked.by}", folder, states, workers, watch)
        except DiskFull as error:
            raise _stopped(str(error), folder, states, workers, watch) from error
        finally:
            for worker in workers:
                with contextlib.suppress(OSError):
                    worker.pipe.send(None)
            for worker in workers:
                worker.process.join(2)
                worker.process.kill()
    watch(states)
    return states


def _start(place: Place, folder: Path) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, place, str(folder)), daemon=True, name=place.name)
    process.start()
    theirs.close()
    return _Worker(place, process, ours)


def _give(worker: _Worker, state: State, folder: Path) -> None:
    failure_note(folder, state.run).unlink(missing_ok=True)
    state.status, state.doing, worker.state = "running", "starting", state
    with contextlib.suppress(OSError):  # a worker that died is mourned in the loop
        worker.pipe.send((state.run.folder, state.run.recipe))


def _listen(worker: _Worker, folder: Path) -> bool:
    """Takes every message that has arrived; whether the worker is still there."""
    while True:
        try:
            if not worker.pipe.poll():
                return True
            kind, content = worker.pipe.recv()
        except (EOFError, OSError):
            return False
        state = worker.state
        if state is None:
            continue
        if kind == "event":
            _note(state, content)
            continue
        state.doing, worker.state = "", None
        if kind == "failed":
            _fail(state, content, folder)
        else:
            state.status, state.loss = "done", content["loss"]
            state.tokens_per_second = content["tokens_per_second"]
        if not _REUSED:
            with contextlib.suppress(OSError):
                worker.pipe.send(None)
            return False


def _note(state: State, event: dict[str, Any]) -> None:
    kind = event.get("event")
    state.step, state.steps = event.get("step", state.step), event.get("steps", state.steps)
    state.doing = {"validating": "validating", "validation": "saving", "checkpoint": "saving"}.get(
        str(kind), ""
    )
    state.loss = event.get("loss", state.loss)
    state.tokens_per_second = event.get("tokens_per_second", state.tokens_per_second)
    state.eta_seconds = event.get("eta_seconds", state.eta_seconds)


def _mourn(worker: _Worker, folder: Path) -> None:
    # Its pipe is closed; one that lives on all the same serves nobody.
    worker.process.join(5)
    worker.process.kill()
    worker.process.join()
    code = worker.process.exitcode or 0
    cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    hint = "; the system may have run out of memory" if code == -signal.SIGKILL else ""
    if worker.state:
        _fail(worker.state, f"the worker process ended with {cause}{hint}", folder)
        worker.state = None


def _fail(state: State, message: str, folder: Path) -> None:
    state.status, state.message, state.doing = "failed", message, ""
    write_text(failure_note(folder, state.run), message + "\n")


def _stopped(
    cause: str, folder: Path, states: Sequence[State], workers: Sequence[_Worker], watch: Watcher
) -> Failure:
    """What to raise, once the running runs have stopped after their step and saved their checkpoints."""
    waiting = [w for w in workers if w.state]
    for worker in waiting:
        assert worker.state is not None
        worker.state.doing = "saving, to stop"
        if worker.process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.process.pid, signal.SIGTERM)
    watch(states)
    while waiting:
        ready = connection.wait([w.pipe for w in waiting], timeout=0.25)
        for worker in [w for w in waiting if w.pipe in ready]:
            try:
                kind, _ = worker.pipe.recv()
            except (EOFError, OSError):
                kind = "gone"
            if kind == "done" and worker.state:
                worker.state.status = "done"  # it was at its end anyway
            if kind != "event":
                waiting.remove(worker)
    done = sum(s.status == "done" for s in states)
    return Failure(
        f"{cause} with {done} of {len(states)} runs done; `entasis study resume {folder}` goes on from there"
    )
