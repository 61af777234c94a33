"""For all tests of studies."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    """A study of toys has one worker then: starting a second takes longer than they do. Each process of pytest has its own."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {sorted(cores, reverse=True)[number % len(cores)]})
    yield
    os.sched_setaffinity(0, cores)
