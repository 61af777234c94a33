"""The worker processes of a study: they serve calls one after another, or make one call as a cluster's job."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from entasis.errors import Failure, UserError

_asked = threading.Event()
"""SIGTERM has come to a worker of this machine. A run hears it for itself; before a run it is remembered here."""
_log = "the job's log"


@dataclass(frozen=True, slots=True)
class Place:
    """What a worker of this machine may use."""

    name: str
    threads: int
    gpu: int | None = None


def train_one(folder: str, run: str, recipe: dict[str, Any]) -> tuple[str, Any]:
    """Trains one run in the study's folder; ("done", result) or ("failed", one line)."""
    from entasis.train import recipe as recipes
    from entasis.train.run import train

    def heed(event: dict[str, Any]) -> None:
        if event.get("event") == "start" and _asked.is_set():
            raise Failure("stopped before its first step")

    # The working folder is the study's, so that recipes name their corpora relative to it and the study can be moved.
    os.chdir(folder)
    try:
        return "done", train(recipes.from_dict(recipe), Path(run), reporter=heed)
    except (UserError, Failure) as error:
        return "failed", str(error)
    except Exception as error:
        return "failed", f"{_told(error)} (more in {_log})"


def attempt(function: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    """("returned", what a call returns), or ("raised", the error whose line is meant for the user)."""
    try:
        return "returned", function(*arguments)
    except (UserError, Failure) as error:
        return "raised", error


def serve(connection: Connection, place: Place, log: str | None) -> None:
    """Answers calls (function, arguments) with ("value", result) or ("lost", why) until it is told to stop (None)."""
    global _log
    occupy(place)
    signal.signal(signal.SIGTERM, lambda number, frame: _asked.set())
    if log is not None:
        # What libraries print goes to a file, not into the live table.
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        with Path(log).open("a", buffering=1, encoding="utf-8") as out:
            os.dup2(out.fileno(), sys.stdout.fileno())
            os.dup2(out.fileno(), sys.stderr.fileno())
        _log = f"{Path(log).parent.name}/{Path(log).name}"
    import torch

    torch.set_num_threads(place.threads)
    while (task := connection.recv()) is not None:
        function, arguments = task
        try:
            answer = "value", function(*arguments)
        except Exception as error:
            answer = "lost", f"{_told(error)} (more in {_log})"
        try:
            connection.send(answer)
        except (BrokenPipeError, EOFError):
            return  # the parent is gone


def occupy(place: Place) -> None:
    """Keeps this process to its threads and GPU; before torch is imported. It lives as long as its parent.

    Signals that reach every process of a study are left to the parent, and kill nobody here.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(place.threads)
    if place.gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[place.gpu] if visible else str(place.gpu)


def _die_with_parent() -> None:
    """Ends this process when its parent ends: the same command would start another run in the folder of an orphan."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _told(error: Exception) -> str:
    """An error that nobody expected in a line; the whole of it goes into the log, unless its disk is what is full."""
    with contextlib.suppress(OSError):
        traceback.print_exception(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
