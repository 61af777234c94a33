"""`entasis import` on damaged checkpoints: GGUF and safetensors headers, indexes, configs, tokenizers.

Most inputs go straight to what reads a source; some take the command line, and are written where they are accepted.
"""

import json
import shutil
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from driver import changed, changes, damaged, damages
from hypothesis import strategies as st
from safetensors import safe_open

from entasis.errors import UserError
from entasis.interop import importing

WORDS = [
    "silu",
    "gelu",
    "llama",
    "qwen3",
    "linear",
    "llama3",
    "yarn",
    "default",
    {"rope_type": "linear", "factor": 0},
]
ALLOWANCE = 160 * 1024
"""What reading even a sound file of this size takes: open files' buffers, the description, Python's own tables."""


class Reading:
    """Reads a source over and over; now and then with its tensors and traced, or through the command line."""

    def __init__(self, fuzz, source: Path, tensors: bool = True) -> None:
        self.fuzz, self.source, self.tensors, self.times = fuzz, source, tensors, 0

    def __call__(self) -> bool:
        self.times += 1
        if self.times % 50 == 0:
            target = self.source.parent / "imported"
            accepted = self.fuzz.command("import", self.source, target)
            shutil.rmtree(target, ignore_errors=True)
            return accepted
        if self.times % 20:
            return read(self.source, tensors=False)
        files = self.source.iterdir() if self.source.is_dir() else [self.source]
        size = sum(f.stat().st_size for f in files)
        # Twice: what is imported for the first time counts for nothing.
        (accepted, first), (_, second) = self.traced(), self.traced()
        assert min(first, second) <= 2 * size + ALLOWANCE, f"{second} bytes for a source of {size}"
        return accepted

    def traced(self) -> tuple[bool, int]:
        """Whether the source is accepted, and the most bytes that reading it took."""
        tracemalloc.start()
        accepted = read(self.source, self.tensors)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return accepted, peak


def read(source: Path, tensors: bool = True) -> bool:
    """Whether a source is accepted; the only error there may be is `UserError`. Its tensors are read and split too."""
    try:
        opened = importing._open(source, None)
    except UserError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
        return False
    for tensor in opened.tensors if tensors else ():
        parts = tensor.split(opened.source.read(tensor.name))
        assert [(name, part.shape) for name, part in parts] == [(p.name, p.size) for p in tensor.parameters]
    opened.source.close()
    return True


def tiny_gguf(path: Path, arch: str) -> bytes:
    """About two kilobytes: one layer of width 4, seven tokens, a chat template."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(8)
    writer.add_block_count(1)
    writer.add_embedding_length(4)
    writer.add_head_count([2])
    writer.add_head_count_kv([1])
    writer.add_feed_forward_length([4])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_key_length(2)
    writer.add_rope_freq_base(1e4)
    tiny.byte_vocabulary(writer, 7)
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")
    sizes = {"token_embd": (7, 4), "output_norm": (4,), "output": (7, 4)}
    sizes |= {f"blk.0.{n}": (4,) for n in ("attn_norm", "ffn_norm")}
    sizes |= {f"blk.0.{n}": (4, 4) for n in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    sizes |= {f"blk.0.{n}": (2, 4) for n in ("attn_k", "attn_v")}
    for name, size in sizes.items():
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))
    writer.add_tensor("rope_freqs.weight", np.ones(1, np.float32))
    tiny.finish(writer)
    return path.read_bytes()


def tiny_folder(folder: Path, **changes: object) -> None:
    same = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    config = {**same, "model_type": "llama", "vocab_size": 7, "rope_parameters": rope, "rms_norm_eps": 1e-5}
    at = "model.layers.0"
    weights = {f"{at}.self_attn.{p}_proj.weight": torch.ones(4, 4) for p in "qkvo"}
    weights |= {f"{at}.mlp.{p}_proj.weight": torch.ones(4, 4) for p in ("gate", "up", "down")}
    weights |= {f"{at}.{p}_layernorm.weight": torch.ones(4) for p in ("input", "post_attention")}
    weights |= {"model.embed_tokens.weight": torch.ones(7, 4), "lm_head.weight": torch.ones(7, 4)}
    weights["model.norm.weight"] = torch.ones(4)
    tiny.save_folder(folder, {**config, **changes}, weights)


def test_gguf(fuzz, memory):
    file = memory / "x.gguf"
    content = tiny_gguf(file, "llama")
    assert read(file)
    assert len(content) < 4000
    reading = Reading(fuzz, file)
    end = content.index(b"rope_freqs.weight") + 60  # of the header

    def check(edits):
        file.write_bytes(damaged(content[:end], edits) + content[end:])
        return reading()

    fuzz(damages(within=end), 30_000, check)
    fuzz.some_accepted()


def test_safetensors(fuzz, memory):
    folder = memory / "x"
    tiny_folder(folder)
    assert read(folder)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    reading = Reading(fuzz, folder)

    def check(edits):
        file.write_bytes(damaged(content[:1400], edits) + content[1400:])
        return reading()

    fuzz(damages(within=1400), 8_000, check)
    fuzz.some_accepted()


def test_index(fuzz, memory):
    folder = memory / "x"
    tiny_folder(folder)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": {}}
    with safe_open(folder / "model-1.safetensors", framework="pt") as opened:
        index["weight_map"] = dict.fromkeys(opened.keys(), "model-1.safetensors")
    either(fuzz, folder, folder / "model.safetensors.index.json", index, 2_000)


@pytest.mark.parametrize("kind", ["llama", "unequal", "unequal-earlier", "deci", "openelm", "gpt2"])
def test_config(kind, fuzz, memory):
    folder = memory / "x"
    if kind == "openelm":
        tiny.save_folder(folder, tiny.OPENELM, tiny.openelm_weights())
    elif kind == "deci":
        state = {k: v for k, v in tiny.DeciLM().state_dict().items() if not k.startswith("rotary")}
        tiny.save_folder(folder, tiny.DECI, state)
    elif kind == "gpt2":
        tiny.hugging_face("gpt2").save_pretrained(folder)
    elif kind == "unequal":
        same = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 4}
        tiny_folder(folder, model_type="entasis_llama", per_layer_config={"0": same})
    elif kind == "unequal-earlier":
        tiny_folder(folder, model_type="entasis_llama", layer_shapes=[[2, 2, 4]])
    else:
        tiny_folder(folder)
    either(fuzz, folder, folder / "config.json", json.loads((folder / "config.json").read_text()), 2_500)
    fuzz.some_accepted()


def test_tokenizer(fuzz, memory):
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    folder = memory / "x"
    tiny_folder(folder)
    file = folder / "tokenizer.json"
    Tokenizer(BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).save(str(file))
    either(fuzz, folder, file, json.loads(file.read_bytes()), 3_000)


def either(fuzz, folder: Path, file: Path, value: object, inputs: int) -> None:
    """The JSON file with changed values or damaged bytes."""
    content = json.dumps(value).encode()
    file.write_bytes(content)
    assert read(folder)
    reading = Reading(fuzz, folder, tensors=False)

    def check(edits):
        broken = isinstance(edits[0][0], str)
        file.write_bytes(damaged(content, edits) if broken else json.dumps(changed(value, edits)).encode())
        return reading()

    fuzz(st.one_of(changes(WORDS), changes(WORDS, most=1), damages()), inputs, check)
