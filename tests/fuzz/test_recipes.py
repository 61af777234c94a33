"""`entasis train --print_config` on damaged recipes and overrides."""

import json

import pytest
import yaml
from driver import NASTY, changed, changes, damaged, damages
from hypothesis import strategies as st

RECIPE = {
    "shape": {"profile": "crown", "layers": 2, "d_model": 32, "head_dim": 16, "tied_embeddings": True, "context": 64},
    "data": {"train": "c/train", "validation": "c/validation", "sequence": 32, "document_masking": False},
    "batch": {"tokens": 64, "micro": 1},
    "optimizer": {"name": "adamw", "lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "max_grad_norm": 1.0},
    "schedule": {"name": "warmup-stable-decay", "warmup": "2%", "decay": "20%"},
    "evaluation": {"every": "50%", "tokens": "1k"},
    "checkpoint": {"every": "50%", "keep_last": 1},
    "stages": [{"tokens": "1k", "trainable": "all"}, {"tokens": "1k", "schedule": {"name": "cosine", "warmup": 2}}],
    "seed": 1, "precision": "fp32", "compile": False, "attention": "sdpa", "device": "cpu",
}  # fmt: skip
WORDS = [
    "crown", "isotropic", "params", "flops", "time", "mup", "muon", "standard", "fsdp", "hsdp", "auto", "cuda", "meta",
    "bf16", "flex", "plain", "8GiB", "1k", "1e400", "2%", "100%", "newest", "blocks.*", ["blocks.0.*"], "linear", "c/train",
    {"selector": "newest"}, {"rank": 4}, {"layers": 3}, "wsd", "cosine", [0.9, 0.95], 64, 3e-3,
]  # fmt: skip
KEYS = [
    "shape.layers", "shape.profile", "shape.budget", "shape.rope_scaling", "data.sequence", "batch.tokens", "batch.micro",
    "optimizer.lr", "optimizer.betas", "optimizer.betas.0", "optimizer.clip", "schedule.warmup", "stages.0.tokens",
    "stages.9.tokens", "stages", "tokens", "seed", "device", "precision", "parallel.kind", "activation_memory", "shape", "",
    "data", "evaluation.every", "checkpoint.keep_every", "checkpoint.every", "logging.wandb", "nothing.a.b", "stages.0.grow",
]  # fmt: skip


@pytest.fixture
def folder(fuzz, memory):
    texts = [f"Document {i} says {'this and that ' * (3 + i % 7)}" for i in range(60)]
    (memory / "a.jsonl").write_text(
        "".join(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(texts))
    )
    options = ("--validation", "20%", "--output", "c")
    assert fuzz.command("data", "prepare", "a.jsonl", "--tokenizer", "bytes", *options)
    (memory / "r.yaml").write_text(yaml.safe_dump(RECIPE))
    assert fuzz.command("train", "r.yaml", "--print_config")
    return memory


def test_recipes(fuzz, folder):
    file = folder / "r.yaml"
    content = yaml.safe_dump(RECIPE).encode()

    def check(edits):
        broken = isinstance(edits[0][0], str)
        file.write_bytes(damaged(content, edits) if broken else json.dumps(changed(RECIPE, edits)).encode())
        return fuzz.command("train", file, "--print_config")

    fuzz(st.one_of(changes(WORDS, most=2), changes(WORDS, most=1), damages()), 3_000, check)
    fuzz.some_accepted()


def test_overrides(fuzz, folder):
    texts = [json.dumps(v) if isinstance(v, dict | list) else str(v) for v in [*WORDS, *NASTY]]
    values = st.one_of(st.sampled_from([*texts, "&a [*a]", "{a: 1, a: 2}", "!!python/name:os.system", "1_0", "[", "0x1F"]),
                       st.text(max_size=6))  # fmt: skip

    def check(given):
        return fuzz.command("train", "r.yaml", "--print_config", *(f"{k}={v}" for k, v in given))

    fuzz(st.lists(st.tuples(st.sampled_from(KEYS), values), min_size=1, max_size=3), 3_000, check)
    fuzz.some_accepted()
