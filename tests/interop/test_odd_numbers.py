"""Numbers that no model can be computed with are refused at import, by name; names of any length are cut."""

import json

import gguf
import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from safetensors.torch import load_file, save_file

from entasis.cli import main
from entasis.model import weights


@pytest.fixture
def whole(tmp_path):
    tiny.hugging_face("llama").save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def refused(tmp_path, capsys):
    """Imports by the command line, which must say `words` in one short line and leave nothing."""

    def check(source, *words, **options):
        before = sorted(tmp_path.iterdir())
        flags = [text for name, value in options.items() for text in (f"--{name}", value)]
        assert main(["import", str(source), str(tmp_path / "out"), *flags]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and len(error) < 400, error
        assert all(word in error for word in words), error
        assert sorted(tmp_path.iterdir()) == before

    return check


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "linear", "factor": 0}, ("factor is 0",)),
        ({"rope_type": "linear", "factor": -2}, ("factor is -2",)),
        ({"rope_type": "default", "rope_theta": 1e-300}, ("rope_theta is 1e-300",)),
        ({"rope_type": "default", "rope_theta": 0}, ("rope_theta is 0",)),
        ({**LLAMA3, "factor": 0.0}, ("factor is 0.0",)),
        ({**LLAMA3, "high_freq_factor": 1.0}, ("high_freq_factor",)),
        ({**LLAMA3, "low_freq_factor": 0}, ("low_freq_factor is 0",)),
        ({**LLAMA3, "original_max_position_embeddings": 0}, ("original_max_position_embeddings is 0",)),
    ],
)
def test_rotary_numbers_of_a_config(whole, refused, rope, words):
    config = json.loads((whole / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 1e4, **rope}
    (whole / "config.json").write_text(json.dumps(config))
    refused(whole, "rope_parameters", *words)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope.freq_base", 1e-30), ("rope.scaling.factor", 0.0), ("attention.layer_norm_rms_epsilon", 2.0)],
)
def test_numbers_of_a_gguf_file(tmp_path, refused, key, value):
    path = tiny.gguf_of_hugging_face(
        tmp_path / "m.gguf", "llama-linear-rope", tiny.hugging_face("llama-linear-rope")
    )
    reader = gguf.GGUFReader(path, "r+")
    reader.get_field(f"llama.{key}").parts[-1][0] = value
    del reader
    refused(path, key)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(whole, refused, value):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(whole / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    refused(whole, f"tensor {name}", "not finite")


def test_weights_too_large_for_the_dtype_asked_for(whole, refused):
    tensors = load_file(whole / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    refused(whole, "tensor model.norm.weight", "too large for float16", dtype="float16")


def test_a_gguf_s_weights_that_are_no_numbers(tmp_path, refused):
    path = tiny.gguf_of_hugging_face(tmp_path / "m.gguf", "llama", tiny.hugging_face("llama"))
    tensor = gguf.GGUFReader(path, "r+").tensors[2]
    tensor.data.reshape(-1)[0] = np.nan
    name = tensor.name
    del tensor
    refused(path, name, "not finite")


def test_very_long_names_are_cut(whole, refused, tmp_path):
    tensors = load_file(whole / "model.safetensors")
    save_file({**tensors, "x" * 100_000: torch.zeros(1)}, whole / "model.safetensors")
    refused(whole, "xxx…xxx", "no place")
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({**config, "model_type": "y" * 100_000}))
    refused(whole, "yyy...")
    (whole / "model.safetensors").unlink()
    index = {"weight_map": {"a": "z" * 100_000}}
    (whole / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(whole, "zzz…zzz")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint32("llama." + "k" * 60_000, 1)
    writer.add_tensor("token_embd.weight", np.zeros((8, 4), np.float32))
    tiny.finish(writer)
    refused(tmp_path / "m.gguf", "kkk…kkk")


def test_the_epsilon_comes_back_from_gguf_as_it_was(tmp_path):
    path = tiny.gguf_of_hugging_face(
        tmp_path / "m.gguf", "llama", tiny.hugging_face("llama", rms_norm_eps=1e-5)
    )
    assert main(["import", str(path), str(tmp_path / "out")]) == 0
    assert weights.read_shape(tmp_path / "out").norm_eps == 1e-5
