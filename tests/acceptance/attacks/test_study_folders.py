"""Every file of a study's folder × every damage: the right verdict, or one line. `make attacks` runs all, `make test` a part."""

import json
import shutil
from pathlib import Path

import pytest

from entasis.cli import main

from .damage import DAMAGES

pytestmark = pytest.mark.xdist_group("study-folders")

STUDY = """
base:
  shape: {{d_model: 16, head_dim: 8, context: 32, layers: [
    {{n_heads: 2, n_kv_heads: 1, d_ff: 32}}, {{n_heads: 1, n_kv_heads: 1, d_ff: 48}}]}}
  data: {{train: corpora/text/train, validation: corpora/text/validation, sequence: 32}}
  batch: {{tokens: 128, micro: 4}}
  tokens: 1280
  precision: fp32
  compile: false
  attention: plain
  device: cpu
  evaluation: {{tokens: 2000}}
  checkpoint: {{every: null}}
  logging: {{tensorboard: false}}
trunks:
  first: {{tokens: 256}}
corpora: {{text: {{sources: [{text}], tokenizer: bytes, validation: 0.3}}}}
arms:
  plain: {{start: {{from: {{trunk: first}}}}}}
  slow: {{start: {{from: {{trunk: first}}}}, optimizer.lr: 1e-4}}
protocols: [time]
seeds: 2
threads: 1
"""

SETTLED = ["study.yaml", "machine.json", "throughput.json", "verdict.json", "report.html"]
CORPUS = [
    "prepared.json",
    "train/corpus.json",
    "train/tokenizer.json",
    "validation/corpus.json",
    "validation/*.safetensors",
]
RUN = [
    "recipe.yaml",
    "shape.json",
    "environment.json",
    "metrics.jsonl",
    "result.json",
    "validation.safetensors",
]
FILES = [*SETTLED, *(f"corpora/text/{n}" for n in CORPUS), *(f"runs/slow/seed-1/{n}" for n in RUN),
         *(f"trunks/first/seed-1/{n}" for n in ("recipe.yaml", "result.json", "model.safetensors"))]  # fmt: skip
OFTEN = {
    ("machine.json", "truncated"),
    ("verdict.json", "one_byte_flipped"),
    ("runs/slow/seed-1/result.json", "empty"),
    ("runs/slow/seed-1/validation.safetensors", "zeroed_block"),
}


@pytest.fixture(scope="module")
def finished(ground, tmp_path_factory) -> Path:
    """A finished study's folder."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "s.yaml").write_text(STUDY.format(text=ground / "text"))
    assert main(["study", "run", str(folder / "s.yaml"), "--output", str(folder / "s")]) == 0
    return folder / "s"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if (name, kind) in OFTEN else pytest.mark.attack)
        for name in FILES
        for kind in DAMAGES
    ],
)
def test_a_study_says_the_same_or_what_is_wrong(call, finished, tmp_path, name, kind):
    study = shutil.copytree(finished, tmp_path / "s")
    right = json.loads((study / "verdict.json").read_text())
    [path] = study.glob(name)
    DAMAGES[kind](path)
    answer = call("study", "resume", study, "--json")
    assert "Traceback" not in answer.err
    if answer.code:
        answer.refused("" if name == "study.yaml" else "damaged: ", str(path), code=answer.code)
        return
    told = json.loads(answer.out)
    assert told["sentence"] == right["sentence"]
    assert json.loads((study / "verdict.json").read_text()) == right
    assert (study / "report.html").is_file()
    for arm, numbers in told["protocols"]["time"]["arms"].items():
        assert numbers["scores"] == right["protocols"]["time"]["arms"][arm]["scores"]
