"""Real text for tests: some modules of the standard library, as bytes, prepared once a session."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from entasis.data.prepare import prepare
from entasis.train.recipe import Recipe, from_dict

MODULES = """antigravity bisect cmd colorsys contextvars copyreg filecmp genericpath heapq keyword linecache
    netrc nturl2path opcode pty queue quopri reprlib rlcompleter sched stat struct this token tty""".split()


DEVICE = os.environ.get("TEST_DEVICE", "cpu")
"""`make test-gpu` says cuda."""


@pytest.fixture(autouse=True)
def one_thread():
    """Sums over several threads round differently; and the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpora(tmp_path_factory) -> Path:
    """A folder with `train` and `validation`, byte tokens, whole files held out."""
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "text").mkdir()
    for name in MODULES:
        shutil.copy(Path(os.__file__).with_name(f"{name}.py"), folder / "text")
    prepare([folder / "text"], folder / "corpora", tokenizer="bytes", validation=0.2)
    return folder / "corpora"


@pytest.fixture(scope="session")
def recipe(corpora):
    """A recipe of a tiny model with two different layers: `recipe(tokens=…, optimizer={…})`."""

    def make(**changes) -> Recipe:
        vocabulary = json.loads((corpora / "train" / "corpus.json").read_text())["vocabulary"]
        source = {
            "shape": {
                "d_model": 32,
                "head_dim": 8,
                "vocabulary": vocabulary,
                "context": 64,
                "layers": [
                    {"n_heads": 2, "n_kv_heads": 1, "d_ff": 48},
                    {"n_heads": 4, "n_kv_heads": 2, "d_ff": 96},
                ],
            },
            "data": {
                "train": str(corpora / "train"),
                "validation": str(corpora / "validation"),
                "sequence": 64,
            },
            "batch": {"tokens": 512},
            "tokens": 512 * 8,
            "optimizer": {"lr": 1e-2},
            "precision": "fp32",
            "compile": False,
            "attention": "plain",
            "device": DEVICE,
            "evaluation": {"tokens": 4000},
            "logging": {"tensorboard": False},
        }
        for name, value in changes.items():
            merge = isinstance(value, dict) and name in source and name != "shape"
            source[name] = {**source[name], **value} if merge else value
        return from_dict(source)

    return make
