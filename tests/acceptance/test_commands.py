"""Every `entasis` command of the README and of the documentation, from an installed wheel in an empty folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from entasis import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ONLY_PARSED = {
    "entasis study run quickstart": "minutes",
    "entasis study run quickstart until.detectable=0.01 until.seeds=30": "minutes",
    "entasis study run quickstart 'arms.reverse={shape.profile: reverse}'": "minutes",
    "entasis study run my-study.yaml until.detectable=0.01 until.seeds=20": "a study of one's own, and minutes",
    "entasis study run FILE --launcher slurm --option slurm_partition=gpu --option gpus_per_node=1 "
    "--option timeout_min=600": "a SLURM cluster",
    "entasis study run FILE --launcher ray --option address=auto --option gpus=1": "a Ray cluster with GPUs",
    "torchrun --nproc-per-node 2 -m entasis train tiny --output runs/tiny": "tests/train/test_parallel.py runs it",
    "entasis bench tiny shape.profile=isotropic compile=true --steps 50 --json": "a compiler, and minutes",
}
"""Commands that need network, a GPU, other machines or minutes, and what they need."""
SICK = ["entasis data doctor sick.bin --dtype uint16"]
"""They say that something is wrong, with exit code 1."""


NAMES = {"FILE": "FILE.yaml", "A": "studies/1M", "B": "studies/2M", "C": "studies/4M"}
"""Toys behind the words that stand for names of one's own."""


def commands(page: Path) -> list[str]:
    """The command lines in a page's fenced blocks, without prompts, comments and explanations beside them."""
    found, fence = [], None
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fence = line.removeprefix("```") if fence is None else None
            continue
        if fence != "":
            continue
        line = re.sub(r"\s{2,}.*", "", line.removeprefix("$ "))
        if line.startswith(("entasis ", "torchrun ")):
            found.append(line)
    return found


def words(command: str) -> list[str]:
    """The arguments that `entasis` gets."""
    argv = shlex.split(command)
    argv = argv[argv.index("entasis") + 1 :]
    return [NAMES.get(word, word) for word in argv]


ALL = {str(page.relative_to(ROOT)): commands(page) for page in PAGES}


def test_commands_are_found_and_the_list_of_exceptions_is_up_to_date():
    every = [c for found in ALL.values() for c in found]
    assert len(every) > 40
    assert set(ONLY_PARSED) | set(SICK) <= set(every)


@pytest.mark.parametrize("command", ONLY_PARSED)
def test_what_is_not_run_is_understood(command):
    assert cli.parse(words(command)).verb == words(command)[0]


@pytest.mark.wheel
def test_every_command_runs_from_a_wheel_in_an_empty_folder(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"  # so that building leaves nothing behind in the checkout
    source.mkdir()
    for name in ("entasis", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run([str(x) for x in build], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)
    pages = {
        # What looks at several studies comes after those that make them.
        page: sorted(
            (words(c) for c in found if c not in ONLY_PARSED),
            key=lambda w: w[1:2] in (["compare"], ["scale"]),
        )
        for page, found in ALL.items()
    }
    (tmp_path / "pages.json").write_text(json.dumps(pages))
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            str(Path(__file__).with_name("toys.py")),
            "stock",
            "pages.json",
            "results.json",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "results.json").read_text())
    assert Path(found["package"]).is_relative_to(tmp_path / "site")
    sick = [" ".join(words(c)) for c in SICK]
    failed = [a for a in found["answers"] if a["code"] != (1 if a["command"] in sick else 0)]
    for a in sorted(found["answers"], key=lambda a: -a["seconds"])[:8]:  # shown when the test fails
        print(f"{a['seconds']:5.1f} s  {a['command']}")
    assert not failed, "\n".join(
        f"{a['page']}: {a['command']}: exit {a['code']}: {a['said']}" for a in failed
    )
    assert len(found["answers"]) > 35
