"""Exported folders whose layers differ: in transformers (from 4.57 on, `make test-compat`), and back through our commands."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from test_export import GELU, OLMO, QWEN, RAGGED, UNEQUAL, ids, made, trained  # noqa: F401  (trained is a fixture)
from transformers import AutoModelForCausalLM

from entasis.cli import main
from entasis.model import weights
from entasis.shape import LayerShape

FIVE = (LayerShape(5, 5, 64), LayerShape(4, 2, 96), LayerShape(2, 1, 32))
"""At d_model 96 the largest number of heads does not divide it, nor does the largest of KV heads divide that of heads."""
BLOCKS = {"llama": {}, "qwen3": QWEN, "olmo2": OLMO, "starcoder2": {**GELU, "head_bias": True}}


@pytest.fixture
def exported(tmp_path, trained):  # noqa: F811
    def export(layers=FIVE, **changes):
        model = made(tmp_path / "model", trained, layers, changes)
        assert main(["export", str(tmp_path / "model"), "--to", "hf", "--output", str(tmp_path / "out")]) == 0
        return model, tmp_path / "out"

    return export


def opened(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def without_code(folder):
    """Makes the folder's code fail wherever it is run."""
    (code,) = folder.glob("modeling_*.py")
    code.write_text("raise SystemExit('the code of the folder was run')\n")
    return folder


def same_weights(ours, folder):
    theirs = dict(weights.load(folder).named_parameters())
    return all(torch.equal(p, theirs[name]) for name, p in ours.named_parameters())


@pytest.mark.parametrize("block", BLOCKS)
def test_it_is_saved_opened_again_and_imported_bit_for_bit(tmp_path, exported, block):
    model, out = exported(**BLOCKS[block])
    theirs = opened(out)
    theirs.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        expected = theirs(ids()).logits
        torch.testing.assert_close(expected, model(ids()), atol=1e-5, rtol=1e-5)
        assert torch.equal(opened(tmp_path / "again")(ids()).logits, expected)
    for name in ("out", "again"):
        folder = without_code(tmp_path / name)
        assert main(["import", str(folder), str(tmp_path / f"imported-{name}")]) == 0
        back = weights.load(tmp_path / f"imported-{name}")
        assert back.shape.layers == model.shape.layers
        assert same_weights(model, tmp_path / f"imported-{name}")


def test_a_config_as_another_transformers_saves_it_means_the_same(tmp_path, exported):
    """transformers 5 leaves out what equals the whole model's, and layers with nothing left, and pads the keys."""
    model, out = exported((*FIVE, *FIVE, *FIVE, *FIVE), **OLMO)
    config = json.loads((out / "config.json").read_text())
    layers = {
        f"{int(i):02}": {key: value for key, value in numbers.items() if value != config[key]}
        for i, numbers in config["per_layer_config"].items()
    }
    config["per_layer_config"] = {key: numbers for key, numbers in layers.items() if numbers}
    (out / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        torch.testing.assert_close(opened(out)(ids()).logits, model(ids()), atol=1e-4, rtol=1e-5)
    assert main(["import", str(without_code(out)), str(tmp_path / "back")]) == 0
    assert weights.load(tmp_path / "back").shape.layers == model.shape.layers


@pytest.mark.parametrize("block", BLOCKS)
def test_every_way_of_attention_and_cache_gives_the_same_tokens(exported, block):
    _, out = exported(UNEQUAL, **BLOCKS[block])
    model = opened(out)
    with torch.no_grad():
        expected = model(ids()).logits
        model.set_attn_implementation("eager")
        assert all(layer.self_attn.config._attn_implementation == "eager" for layer in model.model.layers)
        torch.testing.assert_close(model(ids()).logits, expected, atol=1e-4, rtol=1e-5)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(ids(1, 8), use_cache=False, **settings)
    assert torch.equal(model.generate(ids(1, 8), **settings), plain)
    assert torch.equal(model.generate(ids(1, 8), cache_implementation="static", **settings), plain)


def test_our_commands_open_it_without_running_its_code(tmp_path, exported, capsys):
    model, out = exported(UNEQUAL, **OLMO)
    without_code(out)
    (tmp_path / "text.txt").write_text("def main():\n    return 12345\n" * 40)
    run = {
        "generate": ["generate", str(out), "--prompt", "import ", "--tokens", "8", "--temperature", "0"],
        "evaluate": ["evaluate", str(out), "--text", str(tmp_path / "text.txt"), "--sequence", "32"],
        "anatomy": ["anatomy", str(out), "--text", str(tmp_path / "text.txt"), "--tokens", "200"],
    }
    for verb, arguments in run.items():
        capsys.readouterr()
        assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
        theirs = json.loads(capsys.readouterr().out)
        assert main([*(x.replace(str(out), str(tmp_path / "model")) for x in arguments), "--json"]) == 0
        ours = json.loads(capsys.readouterr().out)
        if verb == "generate":
            assert theirs["continuations"] == ours["continuations"]
        if verb == "evaluate":
            assert theirs["text"]["bits_per_byte"] == pytest.approx(ours["text"]["bits_per_byte"], abs=1e-9)
        if verb == "anatomy":
            assert len(theirs["values"]) == len(ours["values"])
    assert model.shape.layers == UNEQUAL


def test_folders_of_earlier_versions_are_still_read(tmp_path, exported):
    model, out = exported()
    config = json.loads((out / "config.json").read_text())
    layers = config.pop("per_layer_config")
    config["layer_shapes"] = [list(layers[str(i)].values()) for i in range(len(layers))]
    (out / "config.json").write_text(json.dumps(config))
    assert main(["import", str(without_code(out)), str(tmp_path / "back")]) == 0
    assert weights.load(tmp_path / "back").shape.layers == model.shape.layers
    assert same_weights(model, tmp_path / "back")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"per_layer_config": None}, "per_layer_config is None"),
        ({"per_layer_config": {"0": {"skip": ["mlp"]}}}, r"per_layer_config: 0: skip"),
        ({"per_layer_config": {"0": {"sliding_window": 8}}}, r"per_layer_config: 0: sliding_window is 8"),
        ({"per_layer_config": {"7": {}}}, "layers from 0 to 2"),
        ({"per_layer_config": {"1": {}, "01": {}}}, "each once"),
        ({"per_layer_config": {"x" * 5000: {}}}, r"\.\.\."),
        ({"per_layer_config": {"0": {"intermediate_size": -1}}}, "intermediate_size is -1"),
        ({"layer_shapes": [[1, 1, 1]]}, "a list of 3 lists"),
        ({"layer_shapes": [[1, 1], [1, 1], [1, 1]]}, r"layer_shapes\[0\]"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "models here do not do this"),
    ],
)
def test_what_is_not_known_of_a_layer_is_refused(tmp_path, exported, capsys, change, says):
    _, out = exported()
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **change}))
    assert main(["import", str(out), str(tmp_path / "back")]) == 2
    error = capsys.readouterr().err
    assert re.search(says, error)
    assert error.count("\n") == 1 and len(error) < 400
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}])
@pytest.mark.parametrize("layers", [UNEQUAL, UNEQUAL[:1] * 2])
def test_the_card_s_lines_open_model_and_tokenizer_unasked(exported, monkeypatch, layers, scaling):
    _, out = exported(layers, rope_scaling=scaling)
    lines = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
    assert ("trust_remote_code" in lines) == (layers is UNEQUAL)
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", asked.append)
    monkeypatch.chdir(out)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        exec(lines, names := {})
    assert not asked
    assert names["model"].config.vocab_size == 384
    tokenizer = names["tokenizer"]
    assert tokenizer.decode(tokenizer("import json")["input_ids"]) == "import json"


def test_opening_the_tokenizer_by_its_usual_name_gives_no_warning_of_rope(exported, monkeypatch):
    from transformers import AutoTokenizer

    _, out = exported(rope_scaling={"rope_type": "linear", "factor": 2.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    assert tokenizer.decode(tokenizer("import json")["input_ids"]) == "import json"


def test_padding_finds_heads_and_groups_that_divide_the_width(tmp_path, trained, capsys):  # noqa: F811
    pairs = ((4, 2), (6, 2), (3, 1), (2, 1))
    layers = tuple(LayerShape(h, g, 64) for h, g in pairs)
    model = made(tmp_path / "model", trained, layers, {"d_model": 128})
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "model"), "--to", "padded", "--output", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (8, 2)
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids()).logits, model(ids()), atol=1e-5, rtol=1e-5)
    held, own = (sum(p.numel() for p in m.parameters()) for m in (theirs, model))
    said = capsys.readouterr().out
    assert f"{held:,} parameters ({own:,} of the model and {held - own:,} zeros)" in said
    record = json.loads((out / "entasis.json").read_text())
    assert (record["parameters"], record["model_parameters"]) == (held, own)
    assert f"{held:,} here" in (out / "README.md").read_text()


def test_zeros_for_missing_halves_are_counted(tmp_path, trained, capsys):  # noqa: F811
    made(tmp_path / "model", trained, RAGGED, {})
    assert main(["export", str(tmp_path / "model"), "--to", "hf", "--output", str(tmp_path / "out")]) == 0
    held = sum(p.numel() for p in opened(Path(tmp_path / "out")).parameters())
    assert f"{held:,} parameters (" in capsys.readouterr().out
