"""lm-eval over our models gives what lm-eval gives over the exported ones."""

import dataclasses
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors

import entasis
from entasis.cli import main
from entasis.data import tokenizer
from entasis.errors import UserError
from entasis.evaluate.bits_per_byte import Score, interval
from entasis.interop.exporting import export
from entasis.model import weights
from entasis.model.initialisation import init_weights
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

    def save(kind, vocabulary, seed, **told):
        made, ours = Transformer(dataclasses.replace(shape, vocabulary=vocabulary)), folder / f"{kind}ours"
        init_weights(made, seed)
        with torch.no_grad():
            for p in made.parameters():
                p.mul_(3)
        ours.mkdir()
        weights.save(made, ours)
        chosen.save(ours / "tokenizer.json")
        if told:
            (ours / "tokenizer_config.json").write_text(json.dumps(told))
        export(ours, folder / f"{kind}hf", to="padded")

    save("", 400, 0)
    # The same with a tokenizer that begins every text, as Llama's do.
    begins = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 400)])
    chosen.library.add_special_tokens(["<s>"])
    chosen.library.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begins])
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    save("begun-", 401, 1, **kind, bos_token="<s>", eos_token="<|endoftext|>")
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
@pytest.mark.parametrize("kind", ["", "begun-"])
def test_scores_equal_lm_evals_own_model(model, tasks, kind, tmp_path, monkeypatch, capfd):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from entasis.evaluate import harness

    names = ["next_line", "whole_text", "go_on"]
    monkeypatch.chdir(tmp_path)  # which is no repository, and nobody need hear of it
    ours = harness.run(entasis.load(model / f"{kind}ours"), names, include_path=str(tasks))
    assert "fatal" not in capfd.readouterr().err
    theirs = lm_eval.simple_evaluate(
        model=HFLM(
            pretrained=str(model / f"{kind}hf"), device="cpu", dtype="float32", batch_size=4, max_length=256
        ),
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


def ask(judge, text, **settings):
    """lm-eval's own request for a continuation."""
    from lm_eval.api.instance import Instance

    requests = [Instance("generate_until", {}, (text, settings), i) for i in range(settings.pop("times", 1))]
    return judge.generate_until(requests)


@pytest.mark.parametrize("most", [256, 1000])
def test_a_prompt_outlives_a_request_for_more_tokens_than_the_context_has(model, tmp_path, capsys, most):
    """Through the command: the task's answer is the greedy continuation of the whole prompt."""
    text = "import argparse\n\nclass Parser:"
    loaded = entasis.load(model / "ours")
    room = loaded.shape.context - len(loaded.encode(text))
    expected = loaded.generate(text, tokens=room, temperature=0)
    assert expected != loaded.generate("<|endoftext|>", tokens=room, temperature=0)
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": text, "answer": expected}) + "\n")
    task = (UNTIL % (tmp_path / "data.jsonl")).replace('"x"', '"{{answer}}"')
    task = task.replace('["\\n"], max_gen_toks: 12', f'["<never>"], max_gen_toks: {most}')
    (tmp_path / "until.yaml").write_text(task)
    arguments = [
        "evaluate",
        str(model / "ours"),
        "--tasks",
        "go_on",
        "--include-path",
        str(tmp_path),
        "--json",
    ]
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["lm_eval"]["results"]["go_on"]["exact_match,none"] == 1


def test_a_long_prompt_loses_its_beginning_as_in_lm_evals_own_model(model):
    from entasis.evaluate.harness import Harness

    loaded = entasis.load(model / "ours")
    judge = Harness(loaded)
    text = (STDLIB / "ast.py").read_text()[:3000]
    ids = loaded.encode(text)
    assert len(ids) > 256
    (short,) = ask(judge, text, max_gen_toks=16)
    kept = loaded.generate(ids[-(256 - 16) :], tokens=16, temperature=0)
    assert short == loaded.tokenizer.decode(kept)
    (one,) = ask(judge, text, max_gen_toks=256)
    assert one == loaded.tokenizer.decode(loaded.generate(ids[-255:], tokens=1, temperature=0))


def test_the_settings_of_a_task_are_followed_or_refused(model):
    from entasis.evaluate.harness import Harness

    judge = Harness(entasis.load(model / "ours"))
    greedy = ask(judge, "import", max_gen_toks=12)[0]
    assert ask(judge, "import", max_gen_toks=12, temperature=1.0, do_sample=False) == [greedy]
    sampled = ask(judge, "import", max_gen_toks=12, do_sample=True, times=4)
    assert greedy not in sampled and len(set(sampled)) == 4
    assert ask(judge, "import", max_gen_toks=12, temperature=1.0, times=4) == sampled
    assert set(ask(judge, "import", max_new_tokens=12, do_sample=True, top_k=1, times=4)) == {greedy}
    assert set(ask(judge, "import", max_gen_toks=12, do_sample=True, top_p=1e-9, times=4)) == {greedy}
    assert ask(judge, "import", max_gen_toks=12, until=[""]) == [greedy]
    with pytest.raises(UserError, match="generation_kwargs has num_beams"):
        ask(judge, "import", num_beams=4)


def test_a_continuation_longer_than_the_context_is_refused(model):
    from entasis.evaluate.harness import Harness

    judge = Harness(entasis.load(model / "ours"))
    request = [(("", ""), [5, 6], [7] * 257)]
    with pytest.raises(UserError, match="a continuation has 257 tokens; the model's context is 256"):
        judge._loglikelihood_tokens(request)


def test_an_interval_over_many_documents_is_resampled_in_little_memory():
    import tracemalloc

    rng = np.random.default_rng(0)
    sizes = rng.integers(500, 1500, 8000)
    score = Score(sizes * rng.normal(1.4, 0.3, 8000), sizes, sizes)
    tracemalloc.start()
    low, high = interval(score)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    # The same documents are drawn as at once.
    chosen = np.random.default_rng(0).integers(0, 8000, (2000, 8000))
    whole = score.document_nll[chosen].sum(1) / (sizes[chosen].sum(1) * np.log(2))
    assert (low, high) == pytest.approx(np.quantile(whole, [0.025, 0.975]).tolist(), rel=1e-12)
