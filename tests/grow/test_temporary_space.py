"""Temporary files of what fits something first: told before, checked before, and by their own folder's name when full."""

import json
import resource
import shutil
import subprocess
import tempfile
from dataclasses import replace

import pytest

from entasis.cli import main
from entasis.errors import DiskFull
from entasis.grow.folder import grow_folder
from entasis.grow.growth import read_operator
from entasis.model import weights
from entasis.shape.shapes import LayerShape, ModelShape
from tests.grow.test_resize import random_model

SHAPE = ModelShape(d_model=32, head_dim=8, vocabulary=64, layers=(LayerShape(4, 2, 256),) * 4, context=64)
NEED = {"lesa": 4 * 4 * 32 * 256, "lesa_ridge": 12 * 256 * 256}
"""V of `down` in all layers; three blocks of its normal equations."""
OPTIONS = {"lesa": {"after": "1", "epochs": 1}, "lesa_ridge": {"after": "1"}}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    weights.save(random_model(SHAPE).float(), folder)
    return folder


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)  # else what was found before is used
    return folder


@pytest.fixture
def small(temporary):
    """The same on a disk of its own: `small(bytes)`."""

    def mount(size):
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", temporary]
        if subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("no tmpfs may be mounted here; the test under RLIMIT_FSIZE has run")
        return temporary

    yield mount
    subprocess.run(["umount", temporary], capture_output=True, check=False)


def command(model, folder, name):
    options = [f"{key}={value}" for key, value in OPTIONS[name].items()]
    return main(["grow", str(model), str(folder), "--operator", name, *options])


@pytest.mark.parametrize("name", NEED)
def test_a_dry_run_tells_how_much(model, temporary, capsys, name):
    words = ["grow", str(model), "--operator", name, "--after", "1", "--dry-run"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["temporary_bytes"] == NEED[name]
    assert main(words) == 0
    assert f"kB, in {temporary} (TMPDIR)" in capsys.readouterr().out
    assert main(["grow", str(model), "--operator", "average", "--after", "1", "--dry-run"]) == 0
    assert "temporary" not in capsys.readouterr().out


def test_at_8_b_parameters():
    layers = (LayerShape(32, 8, 14336),) * 32
    llama = replace(SHAPE, d_model=4096, head_dim=128, vocabulary=128256, layers=layers)
    sizes = {
        name: read_operator(name, {"after": "top:2", **extra}, "grow").temporary(llama)
        for name, extra in (("lesa", {}), ("lesa_ridge", {}), ("aligned_lesa", {"predictor": "ridge"}))
    }
    ridge = 3 * 4 * 14336**2
    assert sizes == {"lesa": 32 * 4 * 4096 * 14336, "lesa_ridge": ridge, "aligned_lesa": ridge}


@pytest.mark.parametrize("name", NEED)
def test_too_little_is_refused_before_anything_is_done(model, tmp_path, small, capsys, name):
    folder = small(NEED[name] - 4096)
    assert command(model, tmp_path / "grown", name) == 1
    said = capsys.readouterr().err
    assert f"no space left on the disk of {folder} (" in said and "kB needed, " in said and "TMPDIR" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "grown").exists() and not list(tmp_path.glob(".grown*"))


@pytest.mark.parametrize("name", NEED)
def test_a_disk_that_fills_meanwhile_is_told_by_the_temporary_folder_s_name(model, tmp_path, small, name):
    folder = small(2 * NEED[name])
    operator = read_operator(name, OPTIONS[name], "grow")

    def fill(done, total):
        taken = folder / "stuff"
        if not taken.exists():
            taken.write_bytes(bytes(shutil.disk_usage(folder).free))

    with pytest.raises(DiskFull, match=rf"on the disk of {folder} \(.* needed, .* free\); .*TMPDIR"):
        grow_folder(model, tmp_path / "grown", [operator], fitting=fill)
    assert not list(folder.glob("entasis-*"))
    assert not (tmp_path / "grown").exists() and not list(tmp_path.glob(".grown*"))


def test_a_temporary_file_larger_than_allowed_is_one_too(tmp_path, temporary, capsys):
    source = tmp_path / "wide"
    source.mkdir()
    weights.save(random_model(replace(SHAPE, layers=(LayerShape(4, 2, 1024),) * 4)).float(), source)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, before[1]))  # the model takes 2.4 MB, a block 4.2
    try:
        assert command(source, tmp_path / "grown", "lesa_ridge") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert f"larger than allowed here (ulimit -f) on the disk of {temporary} (" in said
    assert not list(temporary.glob("entasis-*")) and not list(tmp_path.glob("*grown*"))
