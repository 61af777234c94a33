"""What rounding takes away is said; what a part does not know of a layer is refused there, not dropped."""

import dataclasses
import json

import pytest

from entasis.cli import main
from entasis.model import weights
from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.shape.shapes import ModelShape

CROWN = "profile=crown,layers=8,d_model=256,head_dim=64,vocabulary=4096"


@pytest.mark.parametrize("budget", ["", ",budget=6M"])
def test_heads_that_all_round_to_one_number_are_noted(capsys, budget):
    assert main(["shape", f"{CROWN},q_per_kv=4{budget}", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {x["n_heads"] for x in answer["layers"]} == {4}
    note = "the silhouette of the heads is lost: multipliers from 0.667 to 1 all round to 4 in steps of 4"
    assert note in answer["notes"]
    assert main(["shape", f"{CROWN},q_per_kv=4{budget}"]) == 0
    assert note in " ".join(capsys.readouterr().out.split())


def test_widths_that_all_round_to_one_number_are_noted(capsys):
    assert main(["shape", f"{CROWN},ffn_multiple=2048", "--json"]) == 0
    assert "FFN widths is lost" in " ".join(json.loads(capsys.readouterr().out)["notes"])


@pytest.mark.parametrize("given", [f"{CROWN},q_per_kv=2", CROWN.replace("crown", "isotropic")])
def test_a_silhouette_that_is_there_or_was_never_asked_for_gives_no_note(capsys, given):
    assert main(["shape", given, "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["notes"]


@pytest.fixture
def odd_layer(tmp_path):
    """A model whose layer 1 has an FFN of another kind than the rest."""
    layer = {"n_heads": 2, "n_kv_heads": 1, "d_ff": 64}
    shape = ModelShape.from_dict(
        {
            "d_model": 32,
            "head_dim": 16,
            "vocabulary": 260,
            "context": 64,
            "layers": [layer, {**layer, "ffn": {"kind": "gelu"}}],
        }
    )
    model = Transformer(shape)
    init_weights(model, 0)
    (tmp_path / "model").mkdir()
    weights.save(model, tmp_path / "model")
    from entasis.data.tokenizer import from_bytes

    from_bytes().save(tmp_path / "model" / "tokenizer.json")
    assert "ffn" in {f.name for f in dataclasses.fields(shape.layers[1])}
    return tmp_path / "model"


def test_a_field_of_a_layer_that_a_part_does_not_know_is_refused(tmp_path, odd_layer, capsys):
    (tmp_path / "text.txt").write_text("def main():\n    return 12345\n" * 20)
    suggest = ["--tokens", "200", "--suggest", "profile", "--budget", "40k"]
    commands = {
        "export --to hf": ["export", str(odd_layer), "--to", "hf", "--output", str(tmp_path / "out")],
        "export --to gguf": ["export", str(odd_layer), "--to", "gguf", "--output", str(tmp_path / "out")],
        "export --to padded": ["export", str(odd_layer), "--to", "padded", "--output", str(tmp_path / "out")],
        "equal layers of equal cost": ["shape", str(odd_layer), "--isotropic", "parameters"],
        "--suggest profile": ["anatomy", str(odd_layer), "--text", str(tmp_path / "text.txt"), *suggest],
    }
    for who, command in commands.items():
        assert main(command) == 2, who
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"entasis: {who}: layer 1 has ffn"), error
    assert not (tmp_path / "out").exists()
