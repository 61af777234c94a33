"""`entasis generate` from a damaged model: weights, shape, and chat template."""

import json

import pytest
import torch
from driver import changed, changes, damaged, damages
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from entasis.data import tokenizer
from entasis.model import weights
from entasis.model.transformer import Transformer
from entasis.shape.shapes import LayerShape, ModelShape


@pytest.fixture
def model(memory):
    torch.manual_seed(0)
    layers = (LayerShape(2, 1, 8), LayerShape(0, 0, 4))
    shape = ModelShape(
        d_model=8, head_dim=4, vocabulary=257, layers=layers, context=16, tied_embeddings=True,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
    )  # fmt: skip
    folder = memory / "m"
    folder.mkdir()
    weights.save(Transformer(shape), folder)
    tokenizer.from_bytes().save(folder / "tokenizer.json")
    return folder


def generate(fuzz, folder, *more):
    return fuzz.command("generate", folder, "--prompt", "ab", "--tokens", "2", "--temperature", "0", *more)


def test_weights(fuzz, model):
    file = model / "model.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")

    def check(edits):
        file.write_bytes(damaged(content[:end], edits) + content[end:])
        return generate(fuzz, model)

    fuzz(damages(within=end), 4_000, check)


def test_shape(fuzz, model):
    file = model / "shape.json"
    shape = json.loads(file.read_text())
    content = file.read_bytes()
    weight = model / "model.safetensors"
    save_file(load_file(weight), weight)  # without the hash of the shape beside it

    def check(edits):
        broken = isinstance(edits[0][0], str)
        file.write_bytes(damaged(content, edits) if broken else json.dumps(changed(shape, edits)).encode())
        return generate(fuzz, model)

    fuzz(st.one_of(changes(["learned", "layernorm", "gelu", "head", "llama3"]), damages()), 3_000, check)
    fuzz.some_accepted()


SENTENCES = [
    "{{ messages }}", "{% for m in messages %}", "{{ m.role }}", "{{ m['content'] | trim }}", "{% endfor %}",
    "{% if add_generation_prompt %}", "{% endif %}", "{{ bos_token }}", "{{ 1/0 }}", "{{ '' * 99 }}", "{% set x = 1 %}",
    "{{ raise_exception('no') }}", "{{ messages | tojson(indent=2) }}", "{{ ''.__class__.__mro__ }}", "{{ x.y.z }}",
    "{{ range(10**9) | list }}", "{{ 'a' * 10**12 }}", "{% include 'x' %}", "{% break %}", "{{ cycler }}", "\ud800", "{#",
    "{% macro a(b) %}{{ a(b) }}{% endmacro %}{{ a(1) }}", "{{ '%999999999d' | format(1) }}", "{{ namespace(a=1).a }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ lipsum(n=10**7) }}",
]  # fmt: skip


def test_chat_templates(fuzz, model):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"

    def check(given):
        parts, edits = given
        text = "".join(parts) or damaged(template.encode(), edits).decode("utf-8", "replace")
        (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))
        return generate(fuzz, model, "--chat")

    parts = st.lists(st.sampled_from(SENTENCES), max_size=4)
    fuzz(st.tuples(parts, damages()), 300, check)
    fuzz.some_accepted()


def test_tokenizer_config(fuzz, model):
    config = {
        "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}], "bos_token": {"content": "<s>"},
        "eos_token": "</s>", "unk_token": None,
    }  # fmt: skip

    def check(edits):
        (model / "tokenizer_config.json").write_text(json.dumps(changed(config, edits)))
        return generate(fuzz, model)

    fuzz(changes(["default"]), 2_000, check)
    fuzz.some_accepted()
