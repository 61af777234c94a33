"""`entasis evaluate` and `entasis generate`: what they say of one text, of odd input, and of numbers out of range."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import entasis
from entasis import cli
from entasis.data import tokenizer
from entasis.interop.exporting import export
from entasis.model import weights
from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.shape import LayerShape, ModelShape

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def made_with(folder: Path, chosen: tokenizer.Tokenizer) -> Path:
    """A model of random weights with this tokenizer."""
    layers = (LayerShape(2, 1, 32), LayerShape(1, 1, 48))
    shape = ModelShape(d_model=32, head_dim=16, vocabulary=chosen.vocabulary, layers=layers, context=128)
    made = Transformer(shape)
    init_weights(made, 0)
    weights.save(made, folder)
    chosen.save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return made_with(folder, tokenizer.train([(STDLIB / "argparse.py").read_text()], 400))


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


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory) -> Path:
    return made_with(tmp_path_factory.mktemp("bytes"), tokenizer.from_bytes())


def test_a_text_cut_by_tokens_scores_as_the_same_text_cut_by_hand(bytes_model, tmp_path, capsys):
    text = "Все счастливые семьи похожи друг на друга, каждая несчастлива по-своему. " * 60
    (tmp_path / "whole.txt").write_text(text, encoding="utf-8")
    for most in (3200, 3201):
        by_hand = text.encode()[:most].decode(errors="ignore")
        (tmp_path / "hand.txt").write_text(by_hand, encoding="utf-8")
        cut = scored(capsys, "evaluate", bytes_model, "--text", tmp_path / "whole.txt", "--tokens", most)
        hand = scored(capsys, "evaluate", bytes_model, "--text", tmp_path / "hand.txt")
        assert cut["bytes"] == hand["bytes"] == len(by_hand.encode())
        # By hand its end is predicted too, and a cut character is not.
        assert cut["bits_per_byte"] == pytest.approx(hand["bits_per_byte"], rel=1e-3)
        assert cut["interval"][0] < cut["bits_per_byte"] < cut["interval"][1]


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


def test_text_that_the_tokenizer_loses_and_its_column_are_told(tmp_path, capsys):
    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    library.train_from_iterator(["Latin text."], trainers.BpeTrainer(vocab_size=60, show_progress=False))
    (tmp_path / "model").mkdir()
    model = made_with(tmp_path / "model", tokenizer.Tokenizer(library))
    rows = [{"body": "Latin text. " * 10 + "и русский"}] * 3
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", str(model), "--text", str(tmp_path / "a.jsonl")]
    assert "name the right one with --column" in refused(capsys, *command)
    assert cli.main([*command, "--column", "body", "--json"]) == 0
    told = capsys.readouterr()
    lost = len("ирусский".encode()) / len(rows[0]["body"].encode())
    assert json.loads(told.out)["text"]["text_lost"] == pytest.approx(lost)
    said = f"the tokenizer loses {100 * lost:.3g} % of the text: its bits per byte cannot be compared"
    assert f"entasis: {said}" in told.err
    whole = ["data", "prepare", str(tmp_path / "a.jsonl"), "--column", "body", "--validation", "0"]
    assert cli.main([*whole, "--tokenizer", str(model), "--output", str(tmp_path / "c")]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", str(model), "--text", str(tmp_path / "c" / "train")]) == 0
    assert said in capsys.readouterr().err
    assert "which has no columns" in refused(
        capsys, "evaluate", model, "--text", tmp_path / "c" / "train", "--column", "body"
    )


def test_a_run_trained_with_documents_masked_is_scored_so_and_says_it(model, tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for name in ("struct", "token", "stat"):
        (tmp_path / "text" / f"{name}.py").write_text((STDLIB / f"{name}.py").read_text())
    command = ["evaluate", model, "--text", tmp_path / "text"]
    plain = scored(capsys, *command)
    assert plain["document_masking"] is False
    masked = scored(capsys, *command, "--document-masking")
    assert masked["document_masking"] is True and masked["nll"] != plain["nll"]
    run = tmp_path / "run"
    shutil.copytree(model, run)
    (run / "recipe.yaml").write_text("data: {train: corpus, document_masking: true}\n")
    command[1] = run
    assert scored(capsys, *command) == masked
    assert scored(capsys, *command, "--no-document-masking") == plain
    assert cli.main([str(a) for a in command]) == 0
    assert "documents masked" in capsys.readouterr().out
    (run / "recipe.yaml").write_text("data: [")
    assert "recipe.yaml does not say data.document_masking; give --document" in refused(capsys, *command)
    assert scored(capsys, *command, "--document-masking") == masked


def test_options_of_what_is_not_scored_are_refused(model, capsys):
    text = ["evaluate", model, "--text", STDLIB / "struct.py"]
    for option, value in (("--limit", 3), ("--fewshot", 2), ("--include-path", "nowhere")):
        assert f"{option} belongs to --tasks" in refused(capsys, *text, option, value)
    tasks = ["evaluate", model, "--tasks", "some"]
    for option in (["--sequence", 8], ["--tokens", 10], ["--column", "body"], ["--no-document-masking"]):
        said = option[0].replace("--no-", "--")
        assert f"{said} belongs to --text" in refused(capsys, *tasks, *option)


def test_raw_weights_and_kept_checkpoints_are_read_as_their_run_is(tmp_path, capsys):
    """With its tokenizer and its masking; exported too."""
    (tmp_path / "text").mkdir()
    for name in ("struct", "token", "stat"):
        shutil.copy(STDLIB / f"{name}.py", tmp_path / "text")
    corpus, run = tmp_path / "corpus", tmp_path / "run"
    command = ["data", "prepare", tmp_path / "text", "--tokenizer", "bytes", "--output", corpus]
    assert cli.main([*map(str, command), "--validation", "0"]) == 0
    recipe = {
        "shape": {"profile": "isotropic", "layers": 1, "d_model": 16, "head_dim": 8, "context": 64},
        "data": {"train": str(corpus / "train"), "sequence": 64, "document_masking": True},
        "batch": {"tokens": 256},
        "tokens": 1024,
        "average": {"ema": 0.5},
        "checkpoint": {"keep_every": 2},
        **{"compile": False, "precision": "fp32", "attention": "sdpa"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert cli.main(["train", str(tmp_path / "recipe.yaml"), "--output", str(run)]) == 0
    for folder in (run, run / "raw", run / "checkpoints" / "step-00000002"):
        capsys.readouterr()
        assert scored(capsys, "evaluate", folder, "--text", tmp_path / "text")["document_masking"]
        out = tmp_path / f"exported-{folder.name}"
        assert cli.main(["export", str(folder), "--to", "hf", "--output", str(out)]) == 0
        assert (out / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()


def test_what_a_tokenizer_begins_texts_with_stands_before_a_prompt_as_in_transformers(tmp_path, capsys):
    """Not where a model was trained here from the start, on corpora without it."""
    library = tokenizer.train([(STDLIB / "argparse.py").read_text()], 300).library
    library.add_special_tokens(["<s>"])
    begins = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 300)])
    library.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begins])
    model = made_with(tmp_path, tokenizer.Tokenizer(library))
    export(model, tmp_path / "hf", to="padded")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = reader("import sys", return_tensors="pt").input_ids
    assert ids[0, 0] == 300
    wanted = theirs.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
    command = ["generate", str(model), "--prompt", "import sys", "--tokens", "8", "--temperature", "0"]

    def tokens() -> list[int]:
        capsys.readouterr()
        assert cli.main([*command, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["continuations"][0]["tokens"]

    assert tokens() == wanted.tolist()
    assert cli.main(command) == 0
    assert capsys.readouterr().out.startswith("import sys")
    assert entasis.load(model).encode("<s>a") == entasis.load(model).encode("a")
    (model / "recipe.yaml").write_text("start: null\n")
    alone = entasis.load(model)
    assert alone.encode("a") == alone.tokenizer.encode("a") and tokens() != wanted.tolist()


def test_a_continuation_keeps_the_space_before_it(tmp_path, capsys):
    library = Library(models.WordLevel({f"▁word{i}": i for i in range(300)}))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    model = made_with(tmp_path, tokenizer.Tokenizer(library))
    chosen = entasis.load(model).tokenizer
    prompts = ["word1", "word2 word3"]
    options = [x for prompt in prompts for x in ("--prompt", prompt)]
    command = ["generate", str(model), *options, "--tokens", "3", "--seed", "1", "--temperature", "1"]
    assert cli.main([*command, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["continuations"]
    for answer in made:
        assert answer["text"].startswith(" word")
        whole = chosen.decode([*chosen.encode(answer["prompt"]), *answer["tokens"]])
        assert answer["prompt"] + answer["text"] == whole
    assert cli.main(command) == 0
    assert capsys.readouterr().out == "".join(f"{a['prompt']}{a['text']}\n---\n" for a in made)
    texts = entasis.load(model).generate(prompts, tokens=3, temperature=1, seed=1)
    assert texts == [answer["text"] for answer in made]


def test_a_chat_model_stops_at_all_ids_that_its_settings_name_and_is_exported_with_them(
    model, tmp_path, capsys
):
    export(model, tmp_path / "hf", to="hf")
    end = entasis.load(model).tokenizer.end_of_text
    settings = tmp_path / "hf" / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": [300, 301], "temperature": 0.7}))
    assert entasis.load(tmp_path / "hf").stop == {end, 300, 301}
    assert cli.main(["import", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    entasis.load(tmp_path / "ours").save(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "again", to="hf")
    told = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert set(told["eos_token_id"]) == {end, 300, 301}
    # Where it is silent, config.json speaks.
    settings.unlink()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "eos_token_id": 302}))
    assert entasis.load(tmp_path / "hf").stop == {end, 302}
    settings.write_text(json.dumps({"eos_token_id": "</s>"}))
    said = refused(capsys, "import", tmp_path / "hf", tmp_path / "none")
    assert "generation_config.json: eos_token_id is '</s>'; it must be an id" in said


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


def test_a_chat_template_that_marks_what_is_trained_on_is_rendered(model, tmp_path):
    from transformers.utils.chat_template_utils import render_jinja_template

    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = """{%- for m in messages %}
<{{ m.role }}>
{%- if m.role == 'assistant' %}
  {%- generation %}{% set inside = 1 %}{{ m.content }}{{ loop.index }}<end>
  {%- endgeneration %}
{%- else %}{{ m.content }}{{ inside is defined }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": content} for role, content in turns]
    ((theirs,), _) = render_jinja_template([messages], chat_template=template, add_generation_prompt=True)
    assert entasis.load(tmp_path).chat.render(messages) == theirs
    assert "b2<end>" in theirs


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
