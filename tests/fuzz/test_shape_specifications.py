"""`entasis shape` on damaged specifications: files, key=value lists, options."""

import json

import hypothesis.strategies as st
import pytest
import yaml
from driver import changed, changes, damaged, damages

from entasis.shape import presets, profiles, rounding
from entasis.shape.solve import MEASURES

WORDS = [
    *presets.names()[:3], *profiles.PROFILES, *rounding.POLICIES, *MEASURES, "crown/reversed", "crown/shuffled:3",
    "180M", "1e3k", "hopper", "swiglu", "gelu", "rope", "learned", "layernorm", "head", 64, 12, 300, 5000,
    "preset", "layers", "d_model", "budget", "aspect", "rope_scaling", "attention_scale",
]  # fmt: skip
SEEDS = {
    "preset": {"preset": "crown-paper/crown-18", "vocabulary": 512, "context": 64},
    "list": {
        "layers": [{"n_heads": 2, "n_kv_heads": 1, "d_ff": 64}, {"n_heads": 0, "n_kv_heads": 0, "d_ff": 32}],
        "d_model": 32, "head_dim": 16, "vocabulary": 100, "context": 32, "tied_embeddings": True,
        "rope_theta": 1e4, "rope_scaling": None, "norm_eps": 1e-5,
    },
    "profile": {"profile": "crown", "layers": 4, "d_model": 64, "head_dim": 16, "vocabulary": 100, "budget": "300k",
                "ffn_multipliers": {"start": 1.0, "mid": 3.0, "end": 1.0}, "rounding": "exact", "q_per_kv": 2},
    "search": {"profile": {"ffn": "crown", "heads": "isotropic"}, "budget": {"parameters": "2M"}, "vocabulary": 100,
               "aspect": 32},
}  # fmt: skip


@pytest.mark.parametrize("kind", list(SEEDS))
def test_values(fuzz, memory, kind):
    file = memory / "shape.json"

    def check(edits):
        file.write_text(json.dumps(changed(SEEDS[kind], edits)))
        return fuzz.command("shape", file, "--json")

    fuzz(changes(WORDS), 500 if kind == "search" else 2_500, check)
    fuzz.some_accepted()


def test_yaml(fuzz, memory):
    file = memory / "shape.yaml"
    content = yaml.safe_dump({"shape": SEEDS["profile"]}).encode()

    def check(edits):
        file.write_bytes(damaged(content, edits))
        return fuzz.command("shape", file, "--json")

    fuzz(damages(), 2_500, check)
    fuzz.some_accepted()


def test_pairs(fuzz, memory):
    pairs = "profile=crown,layers=4,d_model=64,head_dim=16,vocabulary=100,budget=300k,ffn_multipliers.mid=3"

    def check(edits):
        text = damaged(pairs.encode(), edits).decode("utf-8", "surrogateescape")
        return fuzz.command("shape", text.replace("hf:", "").lstrip("-"), "--json")

    fuzz(damages(), 2_500, check)
    fuzz.some_accepted()


def test_options(fuzz, memory):
    options = ["--profile", "--layers", "--d-model", "--head-dim", "--vocabulary", "--budget", "--rounding",
               "--device", "--q-per-kv", "--n-kv-heads", "--set", "--isotropic", "--sequence"]  # fmt: skip
    values = st.sampled_from(
        [str(v) for v in [*WORDS, 0, -1, 1e400, "a=b", "rope_theta=0", "kv_bytes_per_token=64k"]]
    )

    def check(given):
        return fuzz.command("shape", *(f"{k}={v}" for k, v in given), "--json")

    fuzz(st.lists(st.tuples(st.sampled_from(options), values), max_size=5), 1_500, check)
