"""Exporting touches nothing that was there, and leaves all or nothing."""

import os
import resource

import pytest
from test_export import EQUAL, UNEQUAL, made, trained  # noqa: F401  (trained is a fixture)

from entasis.cli import main
from entasis.interop.importing import import_model

FORMATS = [("hf", UNEQUAL), ("hf", EQUAL), ("padded", UNEQUAL), ("gguf", UNEQUAL)]


@pytest.fixture(params=FORMATS, ids=lambda p: f"{p[0]}-{'equal' if p[1] is EQUAL else 'unequal'}")
def command(request, tmp_path, trained):  # noqa: F811
    to, layers = request.param
    made(tmp_path / "model", trained, layers, {})
    return ["export", str(tmp_path / "model"), "--to", to, "--output", str(tmp_path / "out")]


@pytest.fixture
def small_files():
    """No file may grow beyond 100 kB, which is answered like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_called_partial_is_left_alone(tmp_path, command):
    mine = tmp_path / "out.partial" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert main(command) == 0
    assert mine.read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"model", "out", "out.partial"}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_what_is_written_has_the_rights_that_the_user_gives(tmp_path, command, mask):
    before = os.umask(mask)
    try:
        assert main(command) == 0
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o666 & ~mask}


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(tmp_path, command, small_files, capsys):
    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path / "out") in error and " free" in error
    assert (" needed, " in error) == ("padded" not in command)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_at_import(tmp_path, trained, small_files, capsys):  # noqa: F811
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    made(tmp_path / "model", trained, UNEQUAL, {})
    assert main(["export", str(tmp_path / "model"), "--to", "hf", "--output", str(tmp_path / "out")]) == 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    capsys.readouterr()
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "back")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and " needed, " in error
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("to", ["hf", "padded", "gguf"])
def test_a_stop_in_the_middle_leaves_nothing(tmp_path, trained, to, monkeypatch):  # noqa: F811
    made(tmp_path / "model", trained, UNEQUAL, {})
    from entasis.interop import model_card

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(model_card, "write", stop)
    assert main(["export", str(tmp_path / "model"), "--to", to, "--output", str(tmp_path / "out")]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_the_longest_name_a_folder_may_have(tmp_path, trained):  # noqa: F811
    made(tmp_path / "model", trained, UNEQUAL, {})
    name = "n" * 255
    assert main(["export", str(tmp_path / "model"), "--to", "hf", "--output", str(tmp_path / name)]) == 0
    assert import_model(tmp_path / name, tmp_path / ("m" * 255)).parameters
