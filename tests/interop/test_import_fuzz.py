"""A hundred thousand mutated checkpoints: each is read or refused in one line, soon, and at no great cost."""

import json
import random
import resource
import signal
import struct
import tempfile
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from safetensors import safe_open

from entasis.errors import UserError
from entasis.interop import importing

NASTY = [
    0, 1, -1, 2, 3, 7, 10**6, 2**31, 2**63, 10**40, 0.0, -0.5, 1e-300, 1e308, float("nan"), float("inf"), True,
    False, None, "", "silu", "../../etc/passwd", [], [1], {}, {"rope_type": "linear", "factor": 0}, [[[]]], "\ud800",
]  # fmt: skip
LENGTHS = [0, 1, 2**16, 2**31, 2**32, 2**40, 2**60, 2**63, 2**64 - 1]


# What reading even a sound file of this size takes: open files' buffers, the description, Python's own tables.
ALLOWANCE = 160 * 1024


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four damages: flipped, overwritten by a number, cut, repeated or moved."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + 8] = struct.pack("<Q", rng.choice(LENGTHS))
        elif kind == 2:
            data[at : at + 4] = struct.pack("<I", rng.choice(LENGTHS) & 0xFFFFFFFF)
        elif kind == 3 and rng.random() < 0.3:
            del data[at:]
        elif kind == 4:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 5:
            data[at:at] = data[max(0, at - rng.randrange(1, 60)) : at]
        elif at < len(data):
            data[at] = rng.randrange(256)
        if not data:
            break
    return bytes(data)


def changed(config: object, rng: random.Random) -> object:
    """The JSON value with one of its parts, at any depth, replaced, dropped or repeated."""
    config = json.loads(json.dumps(config))
    place = config
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return config
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        choice = rng.random()
        if choice < 0.1:
            del place[key]
        elif choice < 0.2 and isinstance(place, list):
            place.insert(key, place[key])
        else:
            place[key] = rng.choice(NASTY)
        return config


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


@pytest.fixture(autouse=True)
def _guards():
    """No input may hang (the alarm ends the test) nor ask for more memory than the machine would give a stray."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("an input takes more than 20 seconds"))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    signal.alarm(0)


@pytest.fixture
def memory(tmp_path):
    """A folder in memory where there is one: opening a file on a disk costs more than all the rest."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else tmp_path) as folder:
        yield Path(folder)


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


def hammer(source: Path, file: Path, variants, tensors: bool = True) -> int:
    """Reads `source` with each variant as the content of `file`; the number that were accepted.

    Every twentieth read is traced and takes in the tensors: its peak is at most twice the bytes of the source, and
    `ALLOWANCE`.
    """
    accepted = 0
    for i, content in enumerate(variants):
        if i % 1000 == 0:
            signal.alarm(20)
        file.write_bytes(content)
        if i % 20:
            accepted += read(source, tensors=False)
            continue
        tracemalloc.start()
        accepted += read(source, tensors)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        size = sum(f.stat().st_size for f in source.iterdir()) if source.is_dir() else len(content)
        assert peak <= 2 * size + ALLOWANCE, f"input {i}: {peak} bytes for a source of {size}"
    return accepted


@pytest.mark.slow
def test_gguf(memory):
    rng = random.Random(1)
    file = memory / "x.gguf"
    content = tiny_gguf(file, "llama")
    assert read(file)
    assert len(content) < 4000
    header = content[: content.index(b"rope_freqs.weight") + 60]
    rest = content[len(header) :]
    variants = (mutated(header, rng) + rest if i % 3 else mutated(content, rng) for i in range(75_000))
    assert hammer(file, file, variants) > 1000


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


@pytest.mark.slow
def test_safetensors(memory):
    rng = random.Random(2)
    folder = memory / "x"
    tiny_folder(folder)
    assert read(folder)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    variants = (mutated(content[:1400], rng) + content[1400:] if i % 3 else mutated(content, rng)
                for i in range(12_000))  # fmt: skip
    assert hammer(folder, file, variants) > 200


@pytest.mark.slow
def test_index(memory):
    rng = random.Random(3)
    folder = memory / "x"
    tiny_folder(folder)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": {}}
    with safe_open(folder / "model-1.safetensors", framework="pt") as opened:
        index["weight_map"] = dict.fromkeys(opened.keys(), "model-1.safetensors")
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    assert read(folder)
    content = file.read_bytes()
    variants = (
        json.dumps(changed(index, rng)).encode() if i % 2 else mutated(content, rng) for i in range(3_000)
    )
    hammer(folder, file, variants)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "unequal", "unequal-earlier", "deci", "openelm", "gpt2"])
def test_config(kind, memory):
    rng = random.Random(4)
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
    assert read(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    content = json.dumps(config).encode()
    variants = (
        json.dumps(changed(config, rng)).encode() if i % 4 else mutated(content, rng) for i in range(2_500)
    )
    assert hammer(folder, file, variants, tensors=False) > 100


@pytest.mark.slow
def test_tokenizer(memory):
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    rng = random.Random(5)
    folder = memory / "x"
    tiny_folder(folder)
    file = folder / "tokenizer.json"
    Tokenizer(BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).save(str(file))
    assert read(folder)
    content = file.read_bytes()
    value = json.loads(content)
    variants = (
        json.dumps(changed(value, rng)).encode() if i % 2 else mutated(content, rng) for i in range(4_000)
    )
    assert hammer(folder, file, variants) > 100
