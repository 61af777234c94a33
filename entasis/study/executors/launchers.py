"""Runs of a study as jobs of a pool: submitted, watched through their folders, sent again when lost.

A launcher is one registered context manager in one file (`local.py`, `slurm.py`, `ray.py`) that opens a pool. The study's
folder must lie where all its machines see it under the same path.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from entasis import signals
from entasis.errors import DiskFull, Failure, UserError
from entasis.files import read_json, write_text
from entasis.study.executors import worker
from entasis.study.plan import PlannedRun

ATTEMPTS = 3
"""How often a run is started on machines that may be lost or taken away."""
Answer = tuple[str, Any]
"""("value", what a call returned), or ("lost", why its job died)."""


class Job(Protocol):
    """A submitted call."""

    def poll(self) -> Answer | None:
        """None while it waits or works."""

    def cancel(self) -> None:
        """Asks it to stop; a run saves a checkpoint first, where it can."""


class Pool(Protocol):
    """Runs submitted calls, on this machine or others."""

    at_once: int | None
    """How many jobs it is given at a time; None is all of them."""
    alike: int
    """How many jobs measure together what runs will see of one another."""
    attempts: int
    """How often a run is started whose job dies without saying why: a lost node, a preemption, a kill."""
    waits: bool
    """Whether cancelled jobs are waited for."""
    shares_gpus: bool
    """Whether several runs are on one GPU at a time: none is then as fast as it would be alone."""

    def submit(self, name: str, function: Callable[..., Any], *arguments: Any) -> Job: ...


Launcher = Callable[[Path, int | None, Mapping[str, str]], AbstractContextManager[Pool]]
LAUNCHERS: dict[str, Launcher] = {}


def launcher(name: str) -> Callable[[Launcher], Launcher]:
    """Registers `(logs, threads of a run, options) -> pool` as `--launcher name`."""

    def add(open_pool: Launcher) -> Launcher:
        LAUNCHERS[name] = open_pool
        return open_pool

    return add


def find(name: str) -> Launcher:
    """A launcher by its name. Raises `UserError`."""
    from entasis.study.executors import local, ray, slurm  # noqa: F401  they register themselves

    if name not in LAUNCHERS:
        raise UserError(f"--launcher {name!r} is not known; choose one of {', '.join(LAUNCHERS)}")
    return LAUNCHERS[name]


def whole(option: str, given: str) -> int:
    """The whole number that an option is. Raises `UserError` for none, and below 1."""
    if not (given.isascii() and given.isdigit() and int(given)):
        raise UserError(f"--option {option}={given}: a whole number, at least 1")
    return int(given)


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


Watcher = Callable[[Sequence[State]], None]


@dataclass(slots=True)
class _Active:
    state: State
    job: Job
    attempt: int


def execute(folder: Path, runs: Sequence[PlannedRun], pool: Pool, watch: Watcher) -> list[State]:
    """Trains every run that has no result yet. A failed one is noted beside its folder and stops no other.

    A run whose job is lost goes on from its checkpoint, `pool.attempts` times in all. `watch` is called some times a
    second with the states of all runs. Asked to stop (Ctrl-C, SIGTERM), and on a disk too full to note a failure, jobs are
    cancelled and `Failure` is raised; the same call later goes on from there. A second request later waits for nothing.
    """
    states = [State(run, "done" if finished(folder, run) else "waiting") for run in runs]
    queue = [(s, 1) for s in states if s.status == "waiting"]
    active: list[_Active] = []
    with signals.requested() as asked:
        try:
            while (queue or active) and not asked.is_set():
                while queue and (pool.at_once is None or len(active) < pool.at_once):
                    active.append(_submit(folder, *queue.pop(0), pool))
                asked.wait(0.25)
                for one in list(active):
                    _look(folder, one.state)
                    if (answer := one.job.poll()) is None:
                        continue
                    active.remove(one)
                    if answer[0] == "lost" and one.attempt < pool.attempts:
                        one.state.status, one.state.doing = "waiting", f"lost: {answer[1]}"
                        queue.append((one.state, one.attempt + 1))
                    else:
                        _settle(folder, one.state, answer)
                watch(states)
            if asked.is_set():
                raise _stopped(f"stopped by {asked.by}", folder, states, active, pool, watch)
        except DiskFull as error:
            raise _stopped(str(error), folder, states, active, pool, watch) from error
        finally:
            for one in active:  # none, unless something went wrong here
                one.job.cancel()
    return states


def call(pool: Pool, name: str, function: Callable[..., Any], *arguments: Any, at_most: int = 1) -> list[Any]:
    """Makes a call on as many workers at once as runs will be, `at_most` times; returns what each of them returned.

    Raises what the call raises of `UserError` and `Failure`, and `Failure` when a job is lost.
    """
    jobs = [
        pool.submit(name, worker.attempt, function, *arguments)
        for _ in range(max(1, min(pool.alike, at_most)))
    ]
    return [_content(job, name) for job in jobs]


def share(
    pool: Pool,
    name: str,
    function: Callable[..., Any],
    items: Sequence[Any],
    *arguments: Any,
    told: Callable[[], None],
) -> None:
    """Calls `function(items, *arguments)` on as many workers at once as runs will be, each with its share of the items.

    `told` is called while they work. Raises what the call raises of `UserError` and `Failure`, and `Failure` when a job is lost.
    """
    count = min(len(items), pool.alike)
    jobs = [pool.submit(name, worker.attempt, function, items[i::count], *arguments) for i in range(count)]
    for job in jobs:
        _content(job, name, told)


def _content(job: Job, name: str, told: Callable[[], None] = lambda: None) -> Any:
    """What a call returned, once it has."""
    while (answer := job.poll()) is None:
        told()
        time.sleep(0.1)
    if answer[0] == "lost":
        raise Failure(f"{name}: a process was lost: {answer[1]}")
    kind, content = answer[1]
    if kind == "raised":
        raise content
    return content


def failure_note(folder: Path, run: PlannedRun) -> Path:
    """The file beside a run's folder that says why it failed."""
    place = folder / run.folder
    return place.with_name(place.name + ".failure.txt")


def finished(folder: Path, run: PlannedRun) -> bool:
    """Whether a run has its result."""
    return (folder / run.folder / "result.json").is_file()


def _submit(folder: Path, state: State, attempt: int, pool: Pool) -> _Active:
    run = state.run
    failure_note(folder, run).unlink(missing_ok=True)
    state.status, state.doing = "running", "starting"
    job = pool.submit(run.folder, worker.train_one, str(folder), run.folder, run.recipe)
    return _Active(state, job, attempt)


def _settle(folder: Path, state: State, answer: Answer) -> None:
    state.doing = ""
    kind, content = answer[1] if answer[0] == "value" else ("failed", answer[1])
    if finished(folder, state.run):
        _succeed(folder, state)
        return
    state.status, state.message = "failed", str(content) if kind == "failed" else "ended without a result"
    write_text(failure_note(folder, state.run), state.message + "\n")


def _succeed(folder: Path, state: State) -> None:
    result = read_json(folder / state.run.folder / "result.json")
    state.status, state.loss = "done", result["loss"]
    state.tokens_per_second = result["tokens_per_second"]


def _stopped(
    cause: str,
    folder: Path,
    states: Sequence[State],
    active: list[_Active],
    pool: Pool,
    watch: Watcher,
) -> Failure:
    """What to raise, once the running runs have stopped after their step and saved their checkpoints."""
    for one in active:
        one.state.doing = "saving, to stop"
        one.job.cancel()
    watch(states)
    while active and pool.waits:
        time.sleep(0.1)
        for one in [one for one in active if one.job.poll() is not None]:
            active.remove(one)
            if finished(folder, one.state.run):  # it was at its end anyway
                one.state.status = "done"
    active.clear()
    done = sum(s.status == "done" for s in states)
    return Failure(
        f"{cause} with {done} of {len(states)} runs done; `entasis study resume {folder}` goes on from there"
    )


def _look(folder: Path, state: State) -> None:
    """Where a run is, from the last whole line of its metrics."""
    path = folder / state.run.folder / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().split(b"\n")[:-1]
        row = json.loads(lines[-1])
    except (OSError, IndexError, ValueError):
        return  # nothing there yet
    left = state.run.tokens - row["tokens"]
    state.doing, state.step, state.loss = "" if left > 0 else "validating", row["step"], row["loss"]
    state.steps = round(row["step"] * state.run.tokens / row["tokens"])
    state.tokens_per_second = row["tokens_per_second"]
    state.eta_seconds = left / row["tokens_per_second"]
