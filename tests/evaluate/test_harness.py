"""lm-eval over our models gives what lm-eval gives over the exported ones."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

import entasis
from entasis.data import tokenizer
from entasis.errors import UserError
from entasis.evaluate.bits_per_byte import Score, interval
from entasis.interop.exporting import export
from entasis.model import weights
from entasis.model.initialisation import initialise
from entasis.model.transformer import Transformer
from entasis.shape import LayerShape, ModelShape

lm_eval = pytest.importorskip("lm_eval", reason="the extra eval is not installed")
STDLIB = Path(sysconfig.get_paths()["stdlib"])

CHOICE = """
task: next_line
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: whole_text
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
UNTIL = """
task: go_on
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "x"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random unequal model with a real tokenizer, ours and exported."""
    folder = tmp_path_factory.mktemp("model")
    chosen = tokenizer.train([(STDLIB / "argparse.py").read_text()], 400)
    layers = (LayerShape(4, 2, 64), LayerShape(2, 1, 96))
    shape = ModelShape(d_model=64, head_dim=16, vocabulary=400, layers=layers, context=256)
    made = Transformer(shape)
    initialise(made, 0)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(3)
    (folder / "ours").mkdir()
    weights.save(made, folder / "ours")
    chosen.save(folder / "ours" / "tokenizer.json")
    export(folder / "ours", folder / "hf", to="padded")
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Which line comes next, among four of the file; the text of a file; going on."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [x for x in (STDLIB / "ast.py").read_text().splitlines() if len(x) > 20]
    rows = []
    for i in range(0, 120, 4):
        choices = [lines[i + 1], lines[i + 40], lines[i + 77], lines[i + 90]]
        rows.append({"text": "\n".join(lines[max(0, i - 2) : i + 1]) + "\n", "choices": choices, "answer": 0})
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("until", UNTIL)):
        (folder / f"{name}.yaml").write_text(text % (folder / "data.jsonl"))
    return folder


@pytest.mark.slow
def test_scores_equal_lm_evals_own_model(model, tasks):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from entasis.evaluate import harness

    names = ["next_line", "whole_text", "go_on"]
    ours = harness.run(entasis.load(model / "ours"), names, include_path=str(tasks))
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(model / "hf"), device="cpu", dtype="float32", batch_size=4, max_length=256),
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks)),
        log_samples=False,
    )
    for name in names:
        for key, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][key] == pytest.approx(value, rel=1e-4), (name, key)
    assert set(theirs["results"]["next_line"]) == set(ours["results"]["next_line"])


def test_a_shared_context_and_a_lone_one_give_the_same_numbers(model):
    from entasis.evaluate.harness import Harness

    judge = Harness(entasis.load(model / "ours"))
    context, others = [5, 6, 7, 8], [[9, 10, 11], [12], [13, 14]]
    requests = [(("", ""), context, ids) for ids in others]
    together = judge._loglikelihood_tokens(requests)
    alone = [judge._loglikelihood_tokens([request])[0] for request in requests]
    logits = entasis.load(model / "ours").logits([*context, *others[0]]).log_softmax(-1)
    expected = sum(logits[3 + i, t].item() for i, t in enumerate(others[0]))
    assert together[0][0] == pytest.approx(expected, abs=1e-4)
    for a, b in zip(together, alone, strict=True):
        assert a[0] == pytest.approx(b[0], abs=1e-4)
        assert a[1] == b[1]


def test_unknown_tasks_are_named(model):
    from entasis.evaluate import harness

    with pytest.raises(UserError, match="'no_such_task' is not known"):
        harness.run(entasis.load(model / "ours"), ["no_such_task"])


def test_load_opens_our_folders_and_hugging_faces_alike(model):
    ours, theirs = entasis.load(model / "ours"), entasis.load(model / "hf")
    text = "import argparse\n\nclass Parser:"
    torch.testing.assert_close(theirs.logits(text), ours.logits(text), atol=1e-5, rtol=1e-5)
    assert ours.generate(text, tokens=8, temperature=0) == theirs.generate(text, tokens=8, temperature=0)
    assert isinstance(ours.generate([1, 2, 3], tokens=4), list)
    assert ours.shape.layers != theirs.shape.layers
    with pytest.raises(UserError, match="no model here"):
        entasis.load(model)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        sizes = rng.integers(500, 1500, 60)
        nll = sizes * np.log(2) * rng.normal(2.0, 0.3, 60)
        low, high = interval(Score(nll, sizes, sizes), draws=400, seed=trial)
        covered += low < 2.0 < high
    assert 0.90 < covered / 300 < 0.98
    assert interval(Score(np.ones(1), np.ones(1), np.ones(1))) is None
