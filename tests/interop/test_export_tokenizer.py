"""What an exported folder or file says of its tokenizer: the ends of a text, and how text is split."""

import json

import pytest
import torch
from gguf import GGUFReader
from test_export import EQUAL, made
from tokenizers import AddedToken, Regex, pre_tokenizers, processors

from entasis import cli
from entasis.data import tokenizer
from entasis.errors import UserError
from entasis.evaluate.loading import load
from entasis.interop.exporting import export
from entasis.interop.importing import import_model
from entasis.model import weights
from entasis.shape import LayerShape


@pytest.fixture
def chat():
    """A byte-level tokenizer with the special tokens of a chat model."""
    made = tokenizer.from_bytes()
    made.library.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    return tokenizer.Tokenizer(made.library)  # 256 <|endoftext|>, 257 <|im_start|>, 258 <|im_end|>


@pytest.mark.parametrize(
    ("config", "begin", "end", "stops"),
    [
        ({"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}, 257, 258, [258, 256]),
        ({"bos_token": None, "eos_token": "<|im_end|>"}, 256, 258, [258, 256]),
        ({"eos_token": "<|endoftext|>"}, 256, 256, 256),
        ({"bos_token": "\ud800", "eos_token": "<|of_another|>"}, 256, 256, 256),
        (None, 256, 256, 256),
    ],
)
def test_the_ends_of_a_text_are_those_of_the_model(tmp_path, chat, config, begin, end, stops):
    made(tmp_path / "model", chat, EQUAL, {})
    if config is not None:
        (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    export(tmp_path / "model", tmp_path / "hf", to="hf")
    told = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (told["bos_token_id"], told["eos_token_id"]) == (begin, end)
    told = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert told == {"bos_token_id": begin, "eos_token_id": stops}
    export(tmp_path / "model", tmp_path / "gguf", to="gguf")
    fields = GGUFReader(tmp_path / "gguf" / "model-f32.gguf").fields
    ids = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos")]
    assert ids == [begin, end]


@pytest.mark.parametrize(
    ("config", "stops", "keys"),
    [
        ({"chat_template": "", "eos_token": "<|im_end|>"}, [258, 256], {"eos": 258}),
        ({"eos_token": "<|im_end|>"}, [258], {"eos": 258}),
        (
            {"chat_template": "{{ messages }}", "eos_token": "<|im_end|>"},
            [258, 257],
            {"eos": 258, "eot": 257},
        ),
        (None, [300, 301], {"eos": 256, "eot": 300, "eom": 301}),
        ({"eos_token": "<|im_end|>"}, [300, 256, 301, 258, 300], {"eos": 258, "eot": 300, "eom": 301}),
    ],
)
def test_gguf_keeps_what_else_ends_an_answer(tmp_path, chat, config, stops, keys):
    made(tmp_path / "model", chat, EQUAL, {})
    if config is not None:
        (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    assert (
        cli.main(["export", str(tmp_path / "model"), "--to", "gguf", "--output", str(tmp_path / "gguf")]) == 0
    )
    path = tmp_path / "gguf" / "model-f32.gguf"
    fields = GGUFReader(path).fields
    names = ("eos", "eot", "eom")
    found = {n: f.contents() for n in names if (f := fields.get(f"tokenizer.ggml.{n}_token_id"))}
    assert found == keys
    assert cli.main(["import", str(path), str(tmp_path / "back")]) == 0
    assert load(tmp_path / "back").stop == load(tmp_path / "model").stop == {256, *stops}


def test_more_ends_of_an_answer_than_gguf_has_names_for(tmp_path, chat, capsys):
    made(tmp_path / "model", chat, EQUAL, {})
    settings = tmp_path / "model" / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": [256, 300, 301, 302]}))
    command = ["export", str(tmp_path / "model"), "--to", "gguf", "--output", str(tmp_path / "gguf")]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert "generation_config.json has 300, 301, 302; --to hf and --to padded hold it" in said
    assert not (tmp_path / "gguf").exists()
    settings.write_text(json.dumps({"eos_token_id": [256, 300, 301, 384, -1]}))  # ids of no row
    assert cli.main(command) == 0
    assert load(tmp_path / "gguf").stop == {256, 300, 301}


@pytest.mark.parametrize("template", ["$A", "<|im_start|> $A", "$A <|im_end|>", "<|im_start|> $A <|im_end|>"])
def test_what_stands_around_a_text_is_told_and_comes_back(tmp_path, chat, template):
    chat.library.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<|im_start|>", 257), ("<|im_end|>", 258)]
    )
    made(tmp_path / "model", chat, EQUAL, {})
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    export(tmp_path / "model", tmp_path / "gguf", to="gguf")
    path = tmp_path / "gguf" / "model-f32.gguf"
    import_model(path, tmp_path / "back")
    around = [tokenizer.load(f).library.encode("a b").ids for f in (tmp_path / "model", tmp_path / "back")]
    assert around[0] == around[1] and len(around[0]) == 3 + len(template.split()) - 1
    judge = pytest.importorskip("judge_llama_cpp", reason="llama.cpp is not installed")
    assert judge.n_tokens(judge.open_server(path), "a b") == len(around[0])


def test_transformers_stops_where_the_model_does(tmp_path, chat):
    from transformers import AutoModelForCausalLM

    made(tmp_path / "model", chat, EQUAL, {})
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    export(tmp_path / "model", tmp_path / "hf", to="hf")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert opened.generation_config.eos_token_id == [258, 256]


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_tokenizer_that_is_given_replaces_the_tokenizer_alone(tmp_path, chat, to):
    made(tmp_path / "model", chat, EQUAL, {})
    told = {"chat_template": "{{ messages[0].content }}", "eos_token": "<|im_end|>"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(told))
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 10]}))
    export(tmp_path / "model", tmp_path / "out", to=to)
    given = tmp_path / "given.json"
    given.write_text((tmp_path / "model" / "tokenizer.json").read_text())
    (tmp_path / "out" / "tokenizer.json").unlink(missing_ok=True)
    source = tmp_path / "out" if to == "hf" else tmp_path / "out" / "model-f32.gguf"
    assert import_model(source, tmp_path / "back", tokenizer=given).chat_template
    back = load(tmp_path / "back")
    assert back.chat.template == told["chat_template"] and back.stop == {256, 258, 10}


@pytest.mark.parametrize("to", ["hf", "gguf"])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_weights_that_a_dtype_cannot_hold_are_refused(tmp_path, chat, to, dtype, capsys):
    made(tmp_path / "model", chat, EQUAL, {})
    model = weights.load(tmp_path / "model")
    with torch.no_grad():
        model.blocks[1].feedforward.down.weight[3, 4] = 1e5
    weights.save(model, tmp_path / "model")
    command = [
        "export",
        str(tmp_path / "model"),
        "--to",
        to,
        "--dtype",
        dtype,
        "--output",
        str(tmp_path / "o"),
    ]
    if dtype == "bf16":
        assert cli.main(command) == 0
        return
    assert cli.main(command) == 2
    said = "blocks.1.feedforward.down.weight has numbers too large for f16; choose another --dtype"
    assert capsys.readouterr().err == f"entasis: {said}\n" and not (tmp_path / "o").exists()


def test_a_damaged_tokenizer_config_is_named(tmp_path, chat):
    made(tmp_path / "model", chat, EQUAL, {})
    (tmp_path / "model" / "tokenizer_config.json").write_text("[")
    for to in ("hf", "gguf"):
        with pytest.raises(UserError, match=r"tokenizer_config\.json: is not JSON"):
            export(tmp_path / "model", tmp_path / "out", to=to)


def test_a_gguf_file_without_merges_comes_back(tmp_path):
    """llama.cpp wants a list of merges, so one of a byte with itself stands for none."""
    ours = tokenizer.from_bytes()
    made(tmp_path / "model", ours, EQUAL, {})
    export(tmp_path / "model", tmp_path / "out", to="gguf")
    assert import_model(tmp_path / "out" / "model-f32.gguf", tmp_path / "back").tokenizer
    text = "\0\0 na\u00efve  text\n<|endoftext|>"
    assert tokenizer.load(tmp_path / "back").encode(text) == ours.encode(text)


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern, behaviour="isolated"):
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behaviour), bytes_])


def with_digits(individual):
    steps = [pre_tokenizers.Digits(individual), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return pre_tokenizers.Sequence(steps)


@pytest.mark.parametrize(
    ("splitting", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False), "gpt-2"),
        (with_digits(True), "smollm"),
        (split(rf"{WORDS}|\p{{N}}|{REST}"), "qwen2"),
        (split(rf"{WORDS}|\p{{N}}{{1,3}}|{REST}"), "llama-bpe"),
        (split(rf"{WORDS}|\p{{N}}|{REST}", "removed"), None),
        (split(rf"\p{{N}}{{1,3}}|{REST}"), None),
        (split(r"\S+|\s+"), None),
        (with_digits(False), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (None, None),
    ],
)
def test_only_a_splitting_that_is_known_is_named(tmp_path, splitting, name):
    ours = tokenizer.from_bytes()
    if splitting is None:
        content = {**json.loads(ours.library.to_str()), "pre_tokenizer": None}
        ours.library = type(ours.library).from_str(json.dumps(content))
    else:
        ours.library.pre_tokenizer = splitting
    made(tmp_path / "model", ours, (LayerShape(6, 2, 64),), {})
    if name is None:
        with pytest.raises(UserError, match="no name for the tokenizer's splitting"):
            export(tmp_path / "model", tmp_path / "out", to="gguf")
        assert not (tmp_path / "out").exists()
        return
    export(tmp_path / "model", tmp_path / "out", to="gguf")
    assert GGUFReader(tmp_path / "out" / "model-f32.gguf").fields["tokenizer.ggml.pre"].contents() == name
