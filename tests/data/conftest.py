"""Real text for the data room's tests: part of the interpreter's own standard library."""

import sysconfig
from pathlib import Path

import pytest

from entasis.data import tokenizer
from entasis.data.prepare import prepare

NAMES = [
    "argparse",
    "ast",
    "calendar",
    "cgi",
    "configparser",
    "datetime",
    "decimal",
    "difflib",
    "doctest",
    "enum",
    "fractions",
    "heapq",
    "inspect",
]


@pytest.fixture(scope="session")
def texts():
    root = Path(sysconfig.get_paths()["stdlib"])
    return [
        (root / f"{name}.py").read_text(encoding="utf-8") for name in NAMES if (root / f"{name}.py").is_file()
    ]


@pytest.fixture(scope="session")
def folder(tmp_path_factory, texts):
    """A folder of text files."""
    path = tmp_path_factory.mktemp("text")
    for i, text in enumerate(texts):
        (path / f"{i:02}.txt").write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def trained(texts):
    """A tokenizer of 1000 ids."""
    return tokenizer.train(texts[:6], 1000)


@pytest.fixture(scope="session")
def large(texts):
    """A tokenizer of 6000 ids."""
    return tokenizer.train(texts, 6000)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, folder):
    """A prepared corpus, `train` and `validation` in it."""
    output = tmp_path_factory.mktemp("corpus") / "prepared"
    prepare([folder], output, train_tokenizer=1000, validation=0.2, shard_tokens=20_000)
    return output
