"""A run small enough to be attacked some hundred times, made once, and what every attack must end in."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from entasis.cli import main
from entasis.data.prepare import prepare
from entasis.train.metrics import records

RECIPE = """
shape: {{d_model: 16, head_dim: 8, context: 32, layers: [
  {{n_heads: 2, n_kv_heads: 1, d_ff: 32}}, {{n_heads: 1, n_kv_heads: 1, d_ff: 48}}]}}
data: {{train: {corpus}/train, validation: {corpus}/validation, sequence: 32}}
batch: {{tokens: 128, micro: 4}}
tokens: 1280
precision: fp32
compile: false
attention: plain
device: cpu
evaluation: {{tokens: 2000}}
checkpoint: {{every: 2, keep_last: 3, keep_every: 4}}
logging: {{tensorboard: false}}
"""


@dataclass
class Answer:
    """What a call of the command ended with."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What is said of trouble: the lines of stderr that are neither progress nor what is always told."""
        spoken = ("entasis: ", "note: ")
        return [line for line in self.err.splitlines() if line.startswith(spoken)]

    def refused(self, *says: str, code: int = 2) -> None:
        """One line, no traceback, and all of `says` in it."""
        assert self.code == code, (self.code, self.err)
        assert "Traceback" not in self.err
        complaints = [line for line in self.lines if line.startswith("entasis: ")]
        assert len(complaints) == 1, self.err
        for words in says:
            assert words in complaints[0], complaints[0]


@pytest.fixture
def call(capfd):
    """Calls the command in this process."""

    def run(*arguments) -> Answer:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        capfd.readouterr()
        try:
            code = main([str(a) for a in arguments])
        finally:
            torch.set_num_threads(before)
        told = capfd.readouterr()
        return Answer(code, told.out, told.err)

    return run


@pytest.fixture(scope="session")
def ground(tmp_path_factory) -> Path:
    """A folder with text, its corpus, a recipe and its finished run."""
    folder = tmp_path_factory.mktemp("ground")
    (folder / "text").mkdir()
    for name in ("bisect", "heapq", "keyword", "sched", "this", "stat", "cmd", "pty", "copyreg", "struct"):
        shutil.copy(Path(shutil.__file__).with_name(f"{name}.py"), folder / "text")
    prepare([folder / "text"], folder / "corpus", tokenizer="bytes", validation=0.3)
    (folder / "recipe.yaml").write_text(RECIPE.format(corpus=folder / "corpus"))
    torch.set_num_threads(1)
    assert main(["train", str(folder / "recipe.yaml"), "--output", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def run(ground, tmp_path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(ground / "run", tmp_path / "run")


@pytest.fixture
def interrupted(run) -> Path:
    """A copy of the run as it was after step 8 of 10, with checkpoints of steps 4 (kept), 6 and 8."""
    for name in ("result.json", "model.safetensors", "validation.safetensors"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    return run


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in records(folder)]
