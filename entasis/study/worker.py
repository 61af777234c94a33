"""A process that trains one run after another: torch is imported once, and a crash takes only one run with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from entasis.errors import Failure, UserError


@dataclass(frozen=True, slots=True)
class Place:
    """What a worker may use."""

    name: str
    threads: int
    gpu: int | None = None


def serve(connection: Connection, place: Place, folder: str) -> None:
    """Trains what the connection asks for until it is told to stop (None).

    Receives (run's folder, recipe); sends ("event", event), then ("done", result) or ("failed", one line). The
    working folder is the study's, so that recipes name their corpora relative to it and the study can be moved.
    """
    # A run turns Ctrl-C and SIGTERM into a checkpoint; before it the latter, which the parent sends, is remembered.
    asked = threading.Event()
    occupy(place)
    signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    os.chdir(folder)
    log = Path("logs", f"{place.name}.log")
    log.parent.mkdir(exist_ok=True)
    with log.open("a", buffering=1, encoding="utf-8") as out:
        # What libraries print goes to a file, not into the live table.
        os.dup2(out.fileno(), sys.stdout.fileno())
        os.dup2(out.fileno(), sys.stderr.fileno())
        _serve(connection, place, asked)


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
    """Nobody would take what an orphan makes, and the same command would start another in its folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _serve(connection: Connection, place: Place, asked: threading.Event) -> None:
    import torch

    from entasis.train import recipe as recipes
    from entasis.train.run import train

    torch.set_num_threads(place.threads)
    while (task := connection.recv()) is not None:
        folder, plain = task
        try:
            result = train(recipes.from_dict(plain), Path(folder), reporter=_Reporter(connection, asked))
            connection.send(("done", result))
        except (UserError, Failure) as error:
            connection.send(("failed", str(error)))
        except (BrokenPipeError, EOFError):
            return  # the parent is gone
        except Exception as error:
            with contextlib.suppress(OSError):  # the log's disk may be what is full
                traceback.print_exc()
            line = " ".join(str(error).split())[:300]
            connection.send(("failed", f"{type(error).__name__}: {line} (more in logs/{place.name}.log)"))


class _Reporter:
    """Passes events on, steps at most five times a second."""

    def __init__(self, connection: Connection, asked: threading.Event) -> None:
        self.connection, self.asked, self.last = connection, asked, 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        if event.get("event") == "start" and self.asked.is_set():
            raise Failure("stopped before its first step")  # from here on the run hears for itself
        now = time.monotonic()
        if event.get("event") == "step" and now - self.last < 0.2:
            return
        self.last = now
        self.connection.send(("event", event))
