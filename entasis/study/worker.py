"""A process that trains one run after another: torch is imported once, and a crash takes only one run with it."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
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
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a run turns Ctrl-C into a checkpoint; between runs the parent acts
    occupy(place)
    os.chdir(folder)
    log = Path("logs", f"{place.name}.log")
    log.parent.mkdir(exist_ok=True)
    with log.open("a", buffering=1, encoding="utf-8") as out:
        # What libraries print goes to a file, not into the live table.
        os.dup2(out.fileno(), sys.stdout.fileno())
        os.dup2(out.fileno(), sys.stderr.fileno())
        _serve(connection, place)


def occupy(place: Place) -> None:
    """Keeps this process to its threads and GPU; before torch is imported."""
    os.environ["OMP_NUM_THREADS"] = str(place.threads)
    if place.gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[place.gpu] if visible else str(place.gpu)


def _serve(connection: Connection, place: Place) -> None:
    import torch

    from entasis.train import recipe as recipes
    from entasis.train.loop import train

    torch.set_num_threads(place.threads)
    while (task := connection.recv()) is not None:
        folder, plain = task
        try:
            result = train(recipes.from_dict(plain), Path(folder), reporter=_Reporter(connection))
            connection.send(("done", result))
        except (UserError, Failure) as error:
            connection.send(("failed", str(error)))
        except (BrokenPipeError, EOFError):
            return  # the parent is gone
        except Exception as error:
            traceback.print_exc()
            line = " ".join(str(error).split())[:300]
            connection.send(("failed", f"{type(error).__name__}: {line} (more in logs/{place.name}.log)"))


class _Reporter:
    """Passes events on, steps at most five times a second."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.last = connection, 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        if event.get("event") == "step" and now - self.last < 0.2:
            return
        self.last = now
        self.connection.send(("event", event))
