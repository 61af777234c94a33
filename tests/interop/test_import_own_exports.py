"""A folder that we exported comes back with the record of its layers, and any other without."""

import json
import os
import shutil
from pathlib import Path

import pytest

from entasis.cli import main
from entasis.data import tokenizer
from entasis.data.prepare import prepare
from entasis.grow import provenance
from entasis.model import weights
from entasis.shape.shapes import LayerShape, ModelShape
from tests.grow.test_resize import random_model

LAYER = LayerShape(4, 2, 64)
SHAPE = ModelShape(d_model=64, head_dim=16, vocabulary=257, layers=(LAYER,) * 3, context=64)


@pytest.fixture
def exported(tmp_path) -> Path:
    """A model that has been grown in the middle, as a Hugging Face folder."""
    (tmp_path / "model").mkdir()
    weights.save(random_model(SHAPE).float(), tmp_path / "model")
    tokenizer.load("bytes").save(tmp_path / "model" / "tokenizer.json")
    run("grow", tmp_path / "model", tmp_path / "grown", "--operator", "half_step", "--after", "1")
    run("export", tmp_path / "grown", "--to", "hf", "--output", tmp_path / "exported")
    return tmp_path / "exported"


def run(*words) -> None:
    assert main([str(word) for word in words]) == 0


def test_what_was_grown_is_still_the_newest_after_export_and_import(exported, tmp_path):
    run("import", exported, tmp_path / "back")
    assert provenance.read(tmp_path / "back", 4) == provenance.read(tmp_path / "grown", 4)
    (tmp_path / "text").mkdir()
    for name in ("bisect", "heapq", "stat", "keyword"):
        shutil.copy(Path(os.__file__).with_name(f"{name}.py"), tmp_path / "text")
    prepare([tmp_path / "text"], tmp_path / "corpus", tokenizer="bytes", validation=0.3)
    recipe = {
        "start": {"from": str(tmp_path / "back")},
        "data": {"train": str(tmp_path / "corpus/train"), "sequence": 32},
        "batch": {"tokens": 64},
        "stages": [{"tokens": 64, "trainable": "newest"}],
        "precision": "fp32",
        "compile": False,
        "device": "cpu",
        "logging": {"tensorboard": False},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    run("train", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "result.json").read_text())["layers"]
    assert [(row["new"], row["frozen"]) for row in rows] == [
        (False, True), (False, True), (True, False), (False, True),
    ]  # fmt: skip
    run("export", tmp_path / "run", "--to", "hf", "--output", tmp_path / "again")
    run("import", tmp_path / "again", tmp_path / "once-more")
    assert provenance.read_rows(tmp_path / "once-more") == rows


BROKEN = [
    "",
    "[]",
    '{"layers": null}',
    '{"layers": 4}',
    '{"layers": [1, 2, 3, 4]}',
    '{"layers": [{"id": 1, "sources": [1e999], "operator": null, "new": true}]}',
    lambda rows: rows[:-1],
    lambda rows: [rows[0]] * 4,
    lambda rows: [{**row, "history": 3} for row in rows],
]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_record_that_says_nothing_of_these_layers_is_left_behind(exported, tmp_path, broken):
    record = exported / "entasis.json"
    if callable(broken):
        broken = json.dumps({"layers": broken(json.loads(record.read_text())["layers"])})
    record.write_text(broken)
    run("import", exported, tmp_path / "back")
    assert provenance.read(tmp_path / "back", 4) == provenance.begin(4)
