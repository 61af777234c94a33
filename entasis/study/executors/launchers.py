"""Runs of a study as jobs of somebody else's scheduler: submitted, watched through their folders, sent again when lost.

A launcher is one registered context manager in one file (`slurm.py`, `ray.py`). The study's folder must
lie where all machines see it under the same path.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from entasis import signals
from entasis.errors import Failure, UserError
from entasis.files import write_text
from entasis.study.executors.local import State, Watcher, failure_note, finished
from entasis.study.plan import PlannedRun

ATTEMPTS = 3
"""How often a run is started whose job dies without saying why: a lost node, a preemption, a kill."""


class Job(Protocol):
    """A submitted call."""

    def poll(self) -> tuple[str, Any] | None:
        """None while it waits or works, ("value", what it returned), or ("lost", why) when it died."""

    def cancel(self) -> None: ...


class Pool(Protocol):
    """What calls are submitted to. `at_once` is how many jobs it is given at a time; None is all of them."""

    at_once: int | None

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
    from entasis.study.executors import ray, slurm  # noqa: F401  they register themselves

    if name not in LAUNCHERS:
        raise UserError(f"--launcher {name!r} is not known; choose one of local, {', '.join(LAUNCHERS)}")
    return LAUNCHERS[name]


@dataclass(slots=True)
class _Active:
    state: State
    job: Job
    attempt: int


def execute(folder: Path, runs: Sequence[PlannedRun], pool: Pool, watch: Watcher) -> list[State]:
    """As `entasis.study.executors.local.execute`, the runs being jobs of `pool`.

    A run that fails is noted and not tried again; one whose job is lost goes on from its checkpoint, at most
    `ATTEMPTS` times in all. Ctrl-C cancels the jobs and raises `Failure`.
    """
    states = [State(run, "done" if finished(folder, run) else "waiting") for run in runs]
    queue = [(s, 1) for s in states if s.status == "waiting"]
    active: list[_Active] = []
    try:
        while queue or active:
            while queue and (pool.at_once is None or len(active) < pool.at_once):
                state, attempt = queue.pop(0)
                failure_note(folder, state.run).unlink(missing_ok=True)
                state.status, state.doing = "running", "submitted"
                job = pool.submit(
                    state.run.folder, train_one, str(folder), state.run.folder, state.run.recipe
                )
                active.append(_Active(state, job, attempt))
            time.sleep(0.5)
            for one in list(active):
                _look(folder, one.state)
                answer = one.job.poll()
                if answer is None:
                    continue
                active.remove(one)
                if answer[0] == "lost" and one.attempt < ATTEMPTS and not finished(folder, one.state.run):
                    one.state.status, one.state.doing = "waiting", f"lost: {answer[1]}"
                    queue.append((one.state, one.attempt + 1))
                else:
                    _settle(folder, one.state, answer)
            watch(states)
    except KeyboardInterrupt as error:
        done = sum(s.status == "done" for s in states)
        raise Failure(
            f"stopped by {signals.name_of(error)} with {done} of {len(runs)} runs done, the other jobs cancelled; "
            f"`entasis study resume {folder}` goes on from their checkpoints"
        ) from None
    finally:
        for one in active:  # none, unless something went wrong here
            one.job.cancel()
    watch(states)
    return states


def call(pool: Pool, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """One call on a machine of the pool; waits for what it returns. Raises `Failure` when it is lost."""
    job = pool.submit(name, function, *arguments)
    while (answer := job.poll()) is None:
        time.sleep(0.2)
    if answer[0] == "lost":
        raise Failure(f"{name}: the job was lost ({answer[1]})")
    return answer[1]


def train_one(folder: str, run: str, recipe: dict[str, Any]) -> tuple[str, Any]:
    """What a job does: trains one run in the study's folder; ("done", result) or ("failed", one line)."""
    from entasis.train import recipe as recipes
    from entasis.train.run import train

    # The working folder is the study's, so that recipes name their corpora relative to it.
    os.chdir(folder)
    try:
        return "done", train(recipes.from_dict(recipe), Path(run))
    except (UserError, Failure) as error:
        return "failed", str(error)
    except Exception as error:
        traceback.print_exc()
        line = " ".join(str(error).split())[:300]
        return "failed", f"{type(error).__name__}: {line} (more in the job's log)"


def _settle(folder: Path, state: State, answer: tuple[str, Any]) -> None:
    state.doing = ""
    kind, content = answer[1] if answer[0] == "value" else ("failed", answer[1])
    if finished(folder, state.run):
        result = json.loads((folder / state.run.folder / "result.json").read_text(encoding="utf-8"))
        state.status, state.loss = "done", result["loss"]
        state.tokens_per_second = result["tokens_per_second"]
        return
    message = str(content) if kind == "failed" else "ended without a result"
    state.status, state.message = "failed", message
    write_text(failure_note(folder, state.run), message + "\n")


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
    state.doing, state.step, state.loss = "", row["step"], row["loss"]
    state.steps = round(row["step"] * state.run.tokens / row["tokens"])
    state.tokens_per_second = row["tokens_per_second"]
    state.eta_seconds = (state.run.tokens - row["tokens"]) / row["tokens_per_second"]
