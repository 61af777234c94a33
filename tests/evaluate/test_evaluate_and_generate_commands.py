"""`entasis evaluate` and `entasis generate`: what they say of one text, of odd input, and of numbers out of range."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import entasis
from entasis import cli
from entasis.data import tokenizer
from entasis.interop.exporting import export
from entasis.model import weights
from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.shape import LayerShape, ModelShape

STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    layers = (LayerShape(2, 1, 32), LayerShape(1, 1, 48))
    made = Transformer(ModelShape(d_model=32, head_dim=16, vocabulary=400, layers=layers, context=128))
    init_weights(made, 0)
    weights.save(made, folder)
    tokenizer.train([(STDLIB / "argparse.py").read_text()], 400).save(folder / "tokenizer.json")
    return folder


def refused(capsys, *arguments) -> str:
    """The one line that the command prints on exiting with 2."""
    capsys.readouterr()
    assert cli.main([str(a) for a in arguments]) == 2
    shown = capsys.readouterr()
    assert not shown.out and shown.err.startswith("entasis: ") and shown.err.count("\n") == 1
    return shown.err


def scored(capsys, *arguments) -> dict:
    assert cli.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["text"]


def test_a_lone_document_is_cut_and_its_interval_is_over_blocks(model, capsys):
    text = STDLIB / "struct.py"  # 15 lines
    short = scored(capsys, "evaluate", model, "--text", text)
    assert short["documents"] == 1 and short["interval"] is None and short["interval_over"] is None
    text = STDLIB / "ast.py"
    whole = scored(capsys, "evaluate", model, "--text", text)
    assert whole["bytes"] == text.stat().st_size and whole["tokens"] > 5000
    assert whole["interval"][0] < whole["bits_per_byte"] < whole["interval"][1]
    assert whole["interval_over"] == f"{-(-whole['tokens'] // 128)} blocks of 128 tokens of one document"
    cut = scored(capsys, "evaluate", model, "--text", text, "--tokens", "1k")
    assert cut["tokens"] == 1000
    ids = entasis.load(model).tokenizer.encode(text.read_text())[:1000]
    assert cut["bytes"] == pytest.approx(len(entasis.load(model).tokenizer.decode(ids).encode()), abs=16)
    assert cut["interval_over"] == "16 blocks of 64 tokens of one document"
    assert cli.main(["evaluate", str(model), "--text", str(text), "--tokens", "1k"]) == 0
    assert "] over 16 blocks of 64 tokens of one document\n" in capsys.readouterr().out


def test_several_documents_are_whole_and_the_interval_is_over_them(model, tmp_path, capsys):
    for i, name in enumerate(("ast", "struct", "token", "stat")):
        (tmp_path / f"{i}.py").write_text((STDLIB / f"{name}.py").read_text())
    found = scored(capsys, "evaluate", model, "--text", tmp_path)
    assert found["documents"] == 4 and found["interval_over"] == "documents"


def test_a_file_that_cannot_be_read_is_named_on_stderr(model, tmp_path, capsys):
    (tmp_path / "good.py").write_text((STDLIB / "struct.py").read_text())
    (tmp_path / "cafe.txt").write_bytes(b"caf\xe9")
    assert cli.main(["evaluate", str(model), "--text", str(tmp_path), "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["text"]["documents"] == 1
    assert "entasis: left out (not UTF-8): 1 (4 bytes): cafe.txt" in told.err


def test_a_folder_with_a_gguf_file_is_a_model(model, tmp_path, capsys):
    export(model, tmp_path / "out", to="gguf")
    text = STDLIB / "struct.py"
    ours = scored(capsys, "evaluate", model, "--text", text)
    assert scored(capsys, "evaluate", tmp_path / "out", "--text", text)["nll"] == pytest.approx(
        ours["nll"], rel=1e-4
    )
    (file,) = (tmp_path / "out").glob("*.gguf")
    (tmp_path / "out" / "another.gguf").write_bytes(file.read_bytes())
    said = refused(capsys, "evaluate", tmp_path / "out", "--text", text)
    assert f"holds 2 GGUF files; name one: another.gguf, {file.name}" in said


NUMBERS = [
    ("evaluate", "--sequence", ["-1", "0", "1.5", "x", "9" * 60]),
    ("evaluate", "--tokens", ["0", "-1", "1e400", "nan", ""]),
    ("evaluate", "--limit", ["0", "-3"]),
    ("evaluate", "--fewshot", ["-1"]),
    ("generate", "--tokens", ["0", "-1", str(10**12)]),
    ("generate", "--temperature", ["-1", "nan", "inf"]),
    ("generate", "--top-k", ["0"]),
    ("generate", "--top-p", ["0", "1.1", "nan"]),
    ("generate", "--min-p", ["0", "-0.1"]),
    ("generate", "--seed", ["-1", str(2**70)]),
    ("anatomy", "--sequence", ["0", "-1"]),
    ("anatomy", "--tokens", ["0", "1", "-5"]),
    ("anatomy", "--seed", ["-1", str(2**63)]),
    ("anatomy", "--spread", ["nan", "-0.1", "2"]),
    ("bench", "--steps", ["0", "-1"]),
    ("shape", "--sequence", ["0"]),
    ("study plan", "--noise", ["nan", "-1", "0"]),
    ("data prepare", "--train-tokenizer", ["0", "-1"]),
    ("data doctor", "--vocabulary", ["0"]),
]


@pytest.mark.parametrize(("verb", "option", "values"), NUMBERS, ids=lambda x: x if isinstance(x, str) else "")
def test_every_number_has_a_range(model, capsys, verb, option, values):
    for value in values:
        said = refused(capsys, *verb.split(), model, f"{option}={value}")
        assert f"argument {option}: " in said and " must be a " in said and len(said) < 300


@pytest.mark.parametrize("temperature", ["1e-300", "1e-45", "1e-8"])
def test_the_coldest_choice_is_the_likeliest(model, capsys, temperature):
    made = []
    for t in (temperature, "0"):
        command = [
            "generate",
            str(model),
            "--prompt",
            "import",
            "--tokens",
            "8",
            "--temperature",
            t,
            "--json",
        ]
        assert cli.main(command) == 0
        made.append(json.loads(capsys.readouterr().out)["continuations"][0]["tokens"])
    assert made[0] == made[1]


def test_more_keys_and_values_than_there_is_memory_for_are_refused(model, capsys):
    said = refused(capsys, "generate", model, "--prompt", "import", "--tokens", 2**31 - 1)
    assert "their keys and values take" in said and "GiB are free" in said


@pytest.mark.parametrize("verb", ["evaluate", "generate", "anatomy"])
def test_a_device_that_is_not_here_is_named(model, capsys, verb):
    rest = ["--prompt", "x"] if verb == "generate" else ["--text", STDLIB / "struct.py"]
    assert "--device is 'foo'" in refused(capsys, verb, model, *rest, "--device", "foo")
    assert "--device is 'meta'" in refused(capsys, verb, model, *rest, "--device", "meta")
    if not torch.cuda.is_available():
        assert "no CUDA device" in refused(capsys, verb, model, *rest, "--device", "cuda")


def test_a_prompt_that_is_not_text_is_refused(model):
    command = [sys.executable, "-m", "entasis", "generate", str(model)]
    for arguments, given in (([b"--prompt", b"caf\xe9"], b""), ([], b"caf\xe9")):
        done = subprocess.run([os.fsencode(c) for c in command] + arguments, input=given, capture_output=True)
        assert done.returncode == 2 and done.stderr == b"entasis: a prompt is not UTF-8 text\n"


TEMPLATES = [
    ("{{ 1/0 }}", "division by zero"),
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 5 seconds"),
    ("{{ 'a' * 10 ** 11 }}", "more than 1 GiB of memory"),
    ("{{ messages[0].nothing.there }}", "has no attribute"),
    ("{{ raise_exception('no system message') }}", "no system message"),
]


@pytest.mark.parametrize(("template", "says"), TEMPLATES)
def test_a_chat_template_is_held_to_its_limits(model, tmp_path, capsys, template, says):
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    said = refused(capsys, "generate", tmp_path, "--chat", "--prompt", "x")
    assert "the chat template fails: " in said and says in said


def test_a_chat_template_sees_the_messages_and_the_special_tokens(model, tmp_path, capsys):
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = (
        "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content | tojson }}\n{% endfor %}assistant:"
    )
    config = {"chat_template": template, "bos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text = entasis.load(tmp_path).chat.render([{"role": "user", "content": 'Grüß "dich"'}])
    assert text == '<|endoftext|>user: "Grüß \\"dich\\""\nassistant:'


def test_odd_paths_and_odd_yaml_are_the_users_mistake(tmp_path, capsys):
    assert "NUL character" in refused(capsys, "evaluate", "a\0b", "--text", "x")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('shape: {preset: crown-paper/crown-18}\ndata: {train: "a\\0b"}\ntokens: 1k\n')
    assert "NUL character" in refused(capsys, "train", recipe, "--output", tmp_path / "run")
    recipe.write_text("shape: &a {ffn_multipliers: *a}\ndata: {train: x}\ntokens: 1k\n")
    assert "refers to itself" in refused(capsys, "train", recipe, "--output", tmp_path / "run")
    study = tmp_path / "study.yaml"
    study.write_text(
        "base: {shape: &a {ffn_multipliers: *a}, data: {train: x}, tokens: 1k}\narms: {a: {}, b: {}}\n"
    )
    assert "refers to itself" in refused(capsys, "study", "plan", study)


def test_memory_that_is_not_there_is_said_in_words(monkeypatch, capsys):
    from entasis.cli import bench

    def run(args):
        raise MemoryError

    monkeypatch.setattr(bench, "run", run)
    assert cli.main(["bench", "x.yaml"]) == 1
    assert capsys.readouterr().err.startswith("entasis: out of memory")
