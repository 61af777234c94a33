"""Ctrl-C and SIGTERM: a word, a checkpoint, and the same end afterwards."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from entasis.model import weights
from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.shape.shapes import LayerShape, ModelShape

from .conftest import losses

BUNCHES = [
    (signal.SIGTERM, 1),
    *(
        pytest.param(n, k, marks=pytest.mark.attack)
        for n, k in [(signal.SIGTERM, 5), (signal.SIGINT, 1), (signal.SIGINT, 5)]
    ),
]
LONG = ["tokens=12k", "checkpoint.every=null"]


def start(ground, folder, *program):
    return subprocess.Popen(
        [
            sys.executable,
            *(program or ("-m", "entasis")),
            "train",
            ground / "recipe.yaml",
            "--output",
            folder,
            *LONG,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(path, child):
    deadline = time.monotonic() + 300
    while not path.is_file() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.is_file(), child.poll() is not None and child.stderr.read()[-3000:]


@pytest.mark.parametrize(("number", "times"), BUNCHES)
def test_signals_in_a_bunch_are_one_request(call, ground, tmp_path, number, times):
    child = start(ground, tmp_path / "run")
    wait_for(tmp_path / "run" / "metrics.jsonl", child)
    for _ in range(times):
        child.send_signal(number)
        time.sleep(0.03)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 1, err
    assert "Traceback" not in err
    said = [line for line in err.splitlines() if line.startswith("entasis: ")]
    assert len(said) == 1 and "a checkpoint is saved" in said[0]
    assert call("train", ground / "recipe.yaml", "--output", tmp_path / "run", *LONG).code == 0
    assert call("train", ground / "recipe.yaml", "--output", tmp_path / "whole", *LONG).code == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


SLOW = """
import sys, time
from entasis import cli
from entasis.train import checkpoint

def save(folder, *_, **__):
    (folder / "saving").touch()
    time.sleep(300)

checkpoint.save = save
sys.exit(cli.main())
"""


def test_a_second_signal_that_comes_later_ends_the_run_at_once(ground, tmp_path):
    folder = tmp_path / "run"
    child = start(ground, folder, "-c", SLOW)
    try:
        wait_for(folder / "metrics.jsonl", child)
        child.send_signal(signal.SIGTERM)
        wait_for(folder / "saving", child)
        time.sleep(1.2)
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 1 and "Traceback" not in err, err
    assert [x for x in err.splitlines() if x.startswith("entasis: ")] == ["entasis: stopped by SIGTERM"]


def test_a_signal_waits_for_an_import_to_end(tmp_path):
    """torch's own ends the process from C++ where an exception comes out of it."""
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(0.1)\nprint('imported')\n"
    )
    script = (
        "import time\nfrom entasis import signals\nwith signals.raised(last=True):\n    try:\n"
        "        import slow\n        time.sleep(60)\n    except signals.Terminated:\n        print('told')\n"
    )
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, **paths},
    )
    assert (done.stdout, done.returncode) == ("imported\ntold\n", 0), done.stderr


@pytest.mark.parametrize(("number", "times"), BUNCHES)
def test_at_start_up_there_is_a_word_too(call, ground, tmp_path, number, times):
    script = "import sys, entasis.cli, importlib\nprint('ready', flush=True)\nsys.exit(entasis.cli.main())\n"
    child = subprocess.Popen(
        [sys.executable, "-c", script, "train", ground / "recipe.yaml", "--output", tmp_path / "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.7)  # torch is being imported
    for _ in range(times):
        child.send_signal(number)
        time.sleep(0.03)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 1, err
    assert "Traceback" not in err
    # Where a library being imported swallowed the exception, the run stops after its first step instead.
    said = [line for line in err.splitlines() if line.startswith("entasis: ")]
    word = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
    assert len(said) == 1 and (
        said[0] == f"entasis: stopped by {word}" or "a checkpoint is saved" in said[0]
    ), err


@pytest.mark.attack
def test_both_signals_at_once_are_one_request(call, ground, tmp_path):
    child = start(ground, tmp_path / "run")
    wait_for(tmp_path / "run" / "metrics.jsonl", child)
    # Stopped, it cannot finish its step: both signals are pending when it goes on, and neither is lost.
    os.kill(child.pid, signal.SIGSTOP)
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGINT)
    os.kill(child.pid, signal.SIGCONT)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 1
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("entasis: ")]) == 1


@pytest.fixture
def equal(tmp_path):
    """A model of four equal layers and 30 MB, which takes a while to write."""
    shape = ModelShape(d_model=256, head_dim=64, vocabulary=257, layers=(LayerShape(4, 4, 2048),) * 4)
    folder = tmp_path / "model"
    folder.mkdir()
    model = Transformer(shape)
    init_weights(model, 0)
    weights.save(model, folder)
    return folder


FITS = ["lesa", "--after", "1", "epochs=1000000", "patience=0"]  # longer than any test
GROWTHS = {"fits": FITS, "writes": ["stack", "times=4"]}


def half_way(pid, place, folder):
    """The weights that a process is writing in `place`, once some are there and it has a file open in `folder`."""
    opened = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            opened.append(descriptor.readlink())
    if any(path.is_relative_to(folder) for path in opened):
        return next((x for x in place.glob(".*/model.safetensors") if x.stat().st_size > 10**6), None)
    return None


@pytest.mark.parametrize("doing", GROWTHS)
def test_a_growth_that_is_stopped_leaves_nothing(equal, tmp_path, doing):
    place, temporary = tmp_path / "place", tmp_path / "temporary"
    for folder in (place, temporary):
        folder.mkdir()
    child = subprocess.Popen(
        [sys.executable, "-m", "entasis", "grow", equal, place / "grown", "--operator", *GROWTHS[doing]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)},
    )
    try:
        while not (partial := half_way(child.pid, place, temporary if doing == "fits" else place)):
            assert child.poll() is None, child.stderr.read()[-3000:]
            time.sleep(0.005)
        # Stopped, it cannot end before the signal.
        os.kill(child.pid, signal.SIGSTOP)
        assert partial.exists()
        child.send_signal(signal.SIGTERM)
        os.kill(child.pid, signal.SIGCONT)
        out, err = child.communicate(timeout=120)
    finally:
        if child.poll() is None:
            child.kill()
    assert (child.returncode, out) == (1, ""), err
    assert "Traceback" not in err
    assert [x for x in err.splitlines() if x.startswith("entasis: ")] == ["entasis: stopped by SIGTERM"]
    assert list(place.iterdir()) == []
    assert not list(temporary.glob("entasis-*"))


def under_torchrun(program, ground, folder, *, until):
    """Two processes are interrupted once `until` is there; returns what was said on standard error."""
    child = subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            *program, "train", ground / "recipe.yaml", "--output", folder, *LONG,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        wait_for(until, child)
        # As a terminal does: to all of them, and the launcher passes it on.
        os.killpg(child.pid, signal.SIGINT)
        return child.communicate(timeout=120)[1]
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


@pytest.mark.attack
def test_under_torchrun_one_process_speaks(ground, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    err = under_torchrun(["-m", "entasis"], ground, tmp_path / "run", until=metrics)
    said = [line for line in err.splitlines() if line.startswith("entasis: ")]
    assert len(said) == 1 and ("a checkpoint is saved" in said[0] or "stopped by Ctrl-C" in said[0]), err
    saved = bool(list((tmp_path / "run" / "checkpoints").glob("step-*/complete")))
    assert saved == ("a checkpoint is saved" in said[0])


LATE = """
import os, pathlib, sys, time
from entasis import cli, signals

listen, up = signals.requested, pathlib.Path(os.environ["UP"])

def late():
    if os.environ["RANK"] != os.environ["LATE"]:
        up.with_name("other").touch()
        return listen()
    while not up.with_name("other").exists():
        time.sleep(0.05)
    time.sleep(1)  # the other is waiting in its first sum by now
    up.touch()
    time.sleep(60)

signals.requested = late
sys.exit(cli.main())
"""


@pytest.mark.attack
@pytest.mark.parametrize("late", ["0", "1"])
def test_a_process_that_is_not_up_yet_does_not_leave_the_other_with_a_traceback(
    ground, tmp_path, monkeypatch, late
):
    """The signal ends one; the other has taken it for a request, and waits for the first."""
    (tmp_path / "late.py").write_text(LATE)
    monkeypatch.setenv("LATE", late)
    monkeypatch.setenv("UP", str(tmp_path / "up"))
    err = under_torchrun([tmp_path / "late.py"], ground, tmp_path / "run", until=tmp_path / "up")
    said = [line for line in err.splitlines() if line.startswith("entasis: ")]
    assert len(said) == 1 and said[0].startswith("entasis: stopped by Ctrl-C"), err
    assert err.count("Traceback") <= 1, err  # the launcher's own
