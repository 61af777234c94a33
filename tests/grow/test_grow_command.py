"""`entasis grow`: real folders in, models out that compute the same or tell by how much they do not."""

import json
import resource
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from entasis.cli import main
from entasis.cli.shape import read_pairs, split_pairs
from entasis.data import tokenizer
from entasis.evaluate import scoring
from entasis.grow import folder, growth
from entasis.interop.importing import import_model
from entasis.model import weights
from entasis.model.transformer import Transformer
from entasis.shape.presets import PRESETS
from entasis.shape.shapes import LayerFFN, LayerShape, ModelShape
from tests.grow.test_resize import random_model
from tests.interop import tiny_checkpoints as tiny

IDS = tiny.tokens()
EQUAL = ModelShape(d_model=32, head_dim=8, vocabulary=300, layers=(LayerShape(4, 2, 64),) * 4, context=64)
UNEQUAL = replace(EQUAL, layers=(LayerShape(4, 2, 64), LayerShape(2, 1, 32), LayerShape(4, 4, 64)))


@torch.no_grad()
def logits(folder, ids=IDS):
    return weights.load(folder, dtype=torch.float32).eval()(ids)


@pytest.fixture
def model(tmp_path):
    """A folder with a model and its tokenizer: `model(shape)`."""
    trained = tokenizer.train(["some words and some more words, 12345\n" * 20], 270)

    def make(shape=EQUAL, name="model"):
        folder = tmp_path / name
        folder.mkdir()
        weights.save(random_model(shape).float(), folder)
        trained.save(folder / "tokenizer.json")
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": "{{ messages[0].content }}"})
        )
        return folder

    return make


def grow(*words, code=0):
    assert main(["grow", *map(str, words)]) == code


def family(name, folder):
    if name == "openelm":
        source = tiny.save_folder(folder / "source", tiny.OPENELM, tiny.openelm_weights())
    elif name == "decilm":
        state = {k: v for k, v in tiny.DeciLM().state_dict().items() if not k.startswith("rotary")}
        source = tiny.save_folder(folder / "source", tiny.DECI, state)
    else:
        source = folder / "source"
        tiny.hugging_face(name).save_pretrained(source)
    import_model(source, folder / "model")
    return folder / "model"


@pytest.mark.parametrize("name", [*tiny.CASES, "openelm", "decilm"])
def test_every_family_computes_the_same_after_growing(name, tmp_path, capsys):
    source = family(name, tmp_path)
    shape = weights.read_shape(source)
    commands = {"llama_pro": ["--after", "0,2"]}
    if shape.uniform:
        commands |= {key: ["--after", "top:2"] for key in ("zero_average", "zero_aligned_average")}
        wide = shape.layers[0]
        if shape.qk_norm != "full":
            commands["widen"] = [
                f"n_heads={2 * wide.n_heads}",
                f"n_kv_heads={wide.n_kv_heads}",
                f"d_ff={wide.d_ff + 9}",
            ]
        else:
            commands["widen"] = [f"n_heads={2 * wide.n_heads}", f"n_kv_heads={2 * wide.n_kv_heads}"]
    for operator, options in commands.items():
        grow(source, tmp_path / operator, "--operator", operator, *options)
        torch.testing.assert_close(logits(tmp_path / operator), logits(source), atol=1e-5, rtol=0)
        assert "computes something else" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "scales", [{"norm_scaling": True}, {"residual_scale": 0.7}, {"tied_embeddings": True}]
)
def test_factors_of_a_place_go_along(model, tmp_path, scales):
    source = model(replace(EQUAL, **scales))
    for operator in ("llama_pro", "zero_average", "zero_aligned_average"):
        grow(source, tmp_path / operator, "--operator", operator, "--after", "0,1")
        torch.testing.assert_close(logits(tmp_path / operator), logits(source), atol=1e-4, rtol=1e-5)


def test_the_folder_is_a_model_with_everything_it_needs(model, tmp_path, capsys):
    source = model()
    grow(source, tmp_path / "grown", "--operator", "average", "--after", "uniform:2", "--json")
    answer = json.loads(capsys.readouterr().out)
    assert answer["parameters"]["after"] == sum(
        x.numel() for x in load_file(tmp_path / "grown/model.safetensors").values()
    )
    assert [row["sources"] for row in answer["layers"]] == [[0], [0, 1], [1], [2], [2, 3], [3]]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "grown" / name).read_bytes() == (source / name).read_bytes()
    told = json.loads((tmp_path / "grown" / "provenance.json").read_text())
    assert told["operators"] == [{"operator": "average", "after": "uniform:2"}]
    assert told["from"]["weights"] == weights.fingerprint(source)
    assert [(row["id"], row["new"]) for row in told["layers"]] == [
        (0, False), (4, True), (1, False), (2, False), (5, True), (3, False),
    ]  # fmt: skip
    grow(tmp_path / "grown", tmp_path / "more", "--operator", "append_last", "count=1")
    told = json.loads((tmp_path / "more" / "provenance.json").read_text())
    assert [row["id"] for row in told["layers"]] == [0, 4, 1, 2, 5, 3, 6]
    assert [row["new"] for row in told["layers"]] == [False] * 6 + [True]
    assert told["from"]["provenance"]["operators"][0]["operator"] == "average"
    between, last = {"operator": "average", "from": [2, 3]}, {"operator": "append_last", "from": [3]}
    assert [row["history"] for row in told["layers"][4:]] == [[between], [], [last]]
    grow(tmp_path / "more", tmp_path / "wide", "--operator", "widen", "d_ff=80")
    rows = json.loads((tmp_path / "wide" / "provenance.json").read_text())["layers"]
    assert [row["new"] for row in rows] == [False] * 6 + [True]  # wider layers are not new ones
    assert rows[6]["history"] == [last, {"operator": "widen", "from": [6]}]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_numbers_stay_of_their_kind(model, tmp_path, dtype):
    source = model()
    loaded = weights.load(source, dtype=dtype)
    weights.save(loaded, source)
    grow(source, tmp_path / "grown", "--operator", "average", "--after", "0")
    found = load_file(tmp_path / "grown" / "model.safetensors")
    assert {x.dtype for x in found.values()} == {dtype}
    name = "feedforward.up.weight"
    a, b = (loaded.blocks[i].get_parameter(name).double() for i in (0, 1))
    torch.testing.assert_close(found[f"blocks.1.{name}"], ((a + b) / 2).to(dtype))


def test_the_loss_is_measured_before_and_after(model, tmp_path, capsys):
    source, text = model(), tmp_path / "text"
    text.mkdir()
    (text / "good.txt").write_text("some more words and some words\n" * 40)
    (text / "cafe.txt").write_bytes(b"caf\xe9")
    grow(source, tmp_path / "a", "--operator", "half_step", "--after", "1", "--text", text, "--json")
    told = capsys.readouterr()
    losses = json.loads(told.out)["loss"]
    assert told.err.count("cafe.txt") == 1
    assert losses["before"]["tokens"] == losses["after"]["tokens"]
    assert losses["before"]["nats_per_token"] != losses["after"]["nats_per_token"]
    assert main(["evaluate", str(tmp_path / "a"), "--text", str(text), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["text"]
    assert told["bits_per_byte"] == losses["after"]["bits_per_byte"]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": "some more words and some words\n" * 40}))
    growth = ("--operator", "half_step", "--after", "1", "--text", tmp_path / "rows.jsonl")
    grow(source, tmp_path / "rows", *growth, "--column", "body", "--json")
    assert json.loads(capsys.readouterr().out)["loss"] == losses
    grow(source, tmp_path / "b", "--operator", "llama_pro", "--after", "1", "--text", text)
    said = capsys.readouterr().out
    assert "loss on" in said and "computes something else" not in said


def test_tokens_are_of_whole_documents_and_the_help_says_so(model, tmp_path, capsys):
    source, folder = model(), tmp_path / "text"
    folder.mkdir()
    for lines in (40, 60, 90):
        (folder / f"{lines}.txt").write_text("some words and more\n" * lines)

    def scored(name, *words):
        grow(source, tmp_path / name, "--operator", "half_step", "--after", "1", "--text", *words, "--json")
        return json.loads(capsys.readouterr().out)["loss"]["before"]["tokens"]

    sizes = [scored(path.stem, path) for path in folder.iterdir()]
    some = scored("some", folder, "--tokens", 1200)
    assert some in {*sizes, *(sum(sizes) - size for size in sizes)} and some < 1200 < sum(sizes)
    with pytest.raises(SystemExit):
        main(["grow", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "whole documents, at most so many tokens" in told and "a single one is cut there" in told


def test_a_dry_run_writes_nothing(model, tmp_path, capsys):
    source = model()
    before = sorted(tmp_path.iterdir())
    grow(source, "--operator", "stack", "times=3", "--dry-run", "--json")
    answer = json.loads(capsys.readouterr().out)
    assert (
        len(answer["layers"]) == 12
        and answer["folder"] is None
        and answer["memory_bytes"]["training_new"] > 0
    )
    grow(source, tmp_path / "grown", "--operator", "stack", "--dry-run")
    assert "computes something else" in capsys.readouterr().out
    grow(source, "--operator", "reshape", "d_ff=65", "--dry-run")
    assert "computes something else" not in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before


def test_from_one_list_of_layers_to_another(model, tmp_path, capsys):
    source, other = (
        model(),
        model(replace(UNEQUAL, layers=(*UNEQUAL.layers[:2], LayerShape(6, 3, 128)) * 2), "other"),
    )
    grow(
        source,
        tmp_path / "grown",
        "--operator",
        "llama_pro",
        "--after",
        "top:2",
        "--to-shape",
        other,
        "--json",
    )
    told = json.loads(capsys.readouterr().out)
    assert weights.read_shape(tmp_path / "grown").layers == weights.read_shape(other).layers
    assert [row["sources"] for row in told["layers"]] == [[0], [1], [1], [2], [2], [3]]
    assert [row["new"] for row in told["layers"]] == [False, False, True, False, True, False]
    assert told["layers"][2]["operator"] == "llama_pro + reshape"
    assert logits(tmp_path / "grown").isfinite().all()
    assert [p.name for p in (tmp_path / "grown").iterdir() if p.is_dir()] == []
    grow(source, tmp_path / "x", "--to-shape", other, code=2)
    assert "has 6 layers, and the model 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--to-shape", "d_model=64,head_dim=16,profile=isotropic,budget=200k"], "--to-shape: d_model is 64, the model's 32"),
        (["--to-shape", "vocabulary=400,profile=isotropic,budget=100k"], "--to-shape: vocabulary is 400, the model's 300"),
        (["--to-shape", "crown-paper/crown-18", "--operator", "stack"], "--to-shape: d_model is 768, the model's 32"),
        (["--operator", "average", "--after", "1", "after=0"], "give --after or after=, not both"),
        (["--operator", "average", "--after", "1", "--tokens", "20"], "--tokens is of the text"),
        (["--operator", "average", "--after", "1", "--sequence", "20"], "--sequence is of the text"),
        (["--operator", "average", "--after", "1", "--column", "body"], "--column is of the text"),
        (["--operator", "average", "--after", "1", "--text", __file__, "--column", "body"], "no source has columns"),
        (["--operator", "average", "--after", "1", "--dry-run", "--text", "README"], "leave out --dry-run"),
        (["--operator", "average", "--after", "1", "--text", "nothing-there"], "nothing-there"),
    ],
)  # fmt: skip
def test_options_that_would_come_to_nothing_are_refused_before_anything_is_made(
    words, says, model, tmp_path, capsys
):
    grow(model(), tmp_path / "grown", *words, code=2)
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert not (tmp_path / "grown").exists()


LISTED = [{"n_heads": 4, "n_kv_heads": 4, "d_ff": 48}] * 4


@pytest.mark.parametrize(
    ("spec", "kv_heads"),
    [
        ("profile=crown,budget=60k", None),
        ("profile=isotropic,budget=60k,q_per_kv=1", None),
        ("profile=isotropic,budget=60k,n_kv_heads=2", 2),
        (f"layers={json.dumps(LISTED)}", 4),
    ],
)
def test_what_a_target_does_not_say_is_as_in_the_model(model, tmp_path, spec, kv_heads):
    """Vocabulary, tied embeddings, query heads per KV head; as pairs, in a file and in a recipe alike."""
    source, said = model(replace(EQUAL, tied_embeddings=True)), tmp_path / "target.yaml"
    grow(source, tmp_path / "pairs", "--to-shape", spec)
    found = weights.read_shape(tmp_path / "pairs")
    assert (
        found.layers != EQUAL.layers and replace(found, layers=EQUAL.layers, tied_embeddings=False) == EQUAL
    )
    ratio = 1 if "q_per_kv=1" in spec else 2
    for layer in found.layers:
        assert layer.n_kv_heads == (kv_heads or layer.n_heads // ratio)
    written = json.dumps({"d_model": 32, "head_dim": 8, **read_pairs(split_pairs(spec))})
    for name, text in (("file", written), ("recipe", f"shape: {written}")):
        said.write_text(text)
        grow(source, tmp_path / name, "--to-shape", said)
        assert weights.read_shape(tmp_path / name) == found


@pytest.mark.parametrize("as_preset", [False, True])
def test_a_whole_shape_may_differ_in_layers_vocabulary_and_context_alone(
    model, tmp_path, capsys, monkeypatch, as_preset
):
    source, layers = model(), (LayerShape(4, 2, 32),) * 4

    def target(**changes):
        wanted = replace(EQUAL, **{"layers": layers, "vocabulary": 280, "context": 32, **changes})
        monkeypatch.setitem(PRESETS, "tests/target", wanted)
        (tmp_path / "target").mkdir(exist_ok=True)
        (tmp_path / "target" / "shape.json").write_text(json.dumps(wanted.to_dict()))

    specs = ["tests/target", "preset=tests/target"] if as_preset else [tmp_path / "target"]
    for number, spec in enumerate(specs):
        target()
        grow(source, tmp_path / f"grown-{number}", "--to-shape", spec)
        assert weights.read_shape(tmp_path / f"grown-{number}") == replace(EQUAL, layers=layers)
        target(ffn="gelu", qk_norm="head", tied_embeddings=True)
        grow(source, tmp_path / "refused", "--to-shape", spec, code=2)
        said = capsys.readouterr().err
        assert "--to-shape: qk_norm is head, the model's none; ffn is gelu, the model's swiglu; tied" in said
        target(interface={"kind": "random"})
        grow(source, tmp_path / "refused", "--to-shape", spec, code=2)
        assert "--to-shape: interface is {'kind': 'random'" in capsys.readouterr().err
    if as_preset:
        grow(source, tmp_path / "refused", "--to-shape", "preset=tests/target,vocabulary=280", code=2)
        assert "--to-shape: vocabulary is 280, the model's 300" in capsys.readouterr().err


def test_places_are_read_as_the_page_writes_them(model, tmp_path, capsys):
    source, answers = model(), []
    for after in ("0,2", "[0, 2]", "[0,2]"):
        grow(source, "--operator", "average", "--after", after, "--dry-run", "--json")
        answers.append(json.loads(capsys.readouterr().out)["layers"])
    assert answers[0] == answers[1] == answers[2]
    for after in ("[0, 2", "[]", "[top:1]"):
        grow(source, "--operator", "average", "--after", after, "--dry-run", code=2)
        assert f"after is {after!r}; write" in capsys.readouterr().err


def test_what_cannot_be_made_is_refused_before_the_text_is_read_and_in_a_dry_run(
    model, tmp_path, capsys, monkeypatch
):
    def unread(*_):
        raise AssertionError("the text is read")

    monkeypatch.setattr(scoring, "corpus_of", unread)
    source, taken = model(), tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").touch()
    words = ("--operator", "append_last", "count=1")
    for more in (["--text", __file__], ["--dry-run"]):
        grow(source, taken, *words, *more, code=2)
        assert "is there already and not empty" in capsys.readouterr().err
    (source / "recipe.yaml").write_text("shape: {}\n")
    for more in (["--text", __file__], ["--dry-run"]):
        grow(source, tmp_path / "grown", *words, *more, code=2)
        assert capsys.readouterr().err.startswith("entasis: recipe: ")


def test_a_profile_is_drawn_anew_at_the_new_depth(model, tmp_path, capsys):
    source = model()
    grow(
        source,
        tmp_path / "grown",
        "--operator",
        "duplicate",
        "--after",
        "uniform:2",
        "--profile",
        "crown",
        "--json",
    )
    told = json.loads(capsys.readouterr().out)
    widths = [row["d_ff"] for row in told["layers"]]
    assert len(widths) == 6 and max(widths) > min(widths)
    equal = (
        6 / 4 * sum(x.numel() for n, x in load_file(source / "model.safetensors").items() if "blocks" in n)
    )
    outside = sum(x.numel() for n, x in load_file(source / "model.safetensors").items() if "blocks" not in n)
    assert told["parameters"]["after"] == pytest.approx(equal + outside, rel=0.02)


def test_narrowing_keeps_what_the_score_ranks_first(model, tmp_path):
    source = model()
    grow(
        source,
        tmp_path / "wide",
        "--operator",
        "widen",
        "d_ff=80",
        "n_heads=6",
        "n_kv_heads=3",
        "new_units=zeros",
    )
    for importance in ("norm", "first"):
        grow(
            tmp_path / "wide",
            tmp_path / importance,
            "--operator",
            "narrow",
            "d_ff=64",
            "n_heads=4",
            "n_kv_heads=2",
            f"importance={importance}",
        )
        torch.testing.assert_close(logits(tmp_path / importance), logits(source), atol=1e-5, rtol=0)


def test_copies_of_a_unit_learn_different_things(model, tmp_path):
    source = model()
    for noise in (0, 0.5):
        folder = tmp_path / f"noise-{noise}"
        grow(source, folder, "--operator", "widen", "d_ff=128", "n_heads=8", "n_kv_heads=4", f"noise={noise}")
        torch.testing.assert_close(logits(folder), logits(source), atol=2e-5, rtol=0)
        grown: Transformer = weights.load(folder)
        optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            (grown.loss(IDS[:, :-1], IDS[:, 1:]) / IDS.numel()).backward()
            optimizer.step()
        up = grown.blocks[1].feedforward.up.weight.detach()
        value = grown.blocks[1].attention.value.weight.detach()
        apart = [(x[: len(x) // 2] - x[len(x) // 2 :]).abs().max() for x in (up, value)]
        assert all(x > 1e-4 for x in apart) if noise else all(x < 1e-5 for x in apart)


def narrow(folder, dtype):
    """The model with its weights in another dtype."""
    weights.save(weights.load(folder, dtype=dtype), folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise", [0, 0.5, 4])
def test_shares_of_copies_add_up_in_narrow_dtypes_too(model, tmp_path, capsys, dtype, noise):
    source = narrow(model(), dtype)
    widths = [
        "d_ff=150",
        "n_heads=12",
        "n_kv_heads=6",
    ]  # two or three copies of each unit, three of each head
    grow(source, tmp_path / "wide", "--operator", "widen", *widths, f"noise={noise}", "--json")
    assert json.loads(capsys.readouterr().out)["keeps_function"] is True
    torch.testing.assert_close(logits(tmp_path / "wide"), logits(source), atol=2e-5, rtol=0)
    old, new = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "wide"))
    name = "blocks.1.feedforward.down.weight"
    assert new[name].dtype == dtype
    sums = torch.zeros(32, 64, dtype=torch.float64).index_add_(1, torch.arange(150) % 64, new[name].double())
    assert torch.equal(sums, old[name].double())
    apart = (new[name][:, :64] - new[name][:, 64:128]).float().square().mean().sqrt()
    assert apart > 0.05 if noise else apart < 0.005


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_scaling": True}, ["llama_pro", "--after", "0,1"]),
        ({"qk_norm": "full"}, ["widen", "n_heads=8", "n_kv_heads=4", "new_units=zeros"]),
    ],
)
def test_factors_that_a_narrow_dtype_rounds_are_told(model, tmp_path, capsys, changes, words):
    source = model(replace(EQUAL, **changes))
    grow(source, tmp_path / "wide", "--operator", *words)
    assert "computes" not in capsys.readouterr().out
    narrow(source, torch.bfloat16)
    grow(source, tmp_path / "rounded", "--operator", *words)
    said = capsys.readouterr().out
    assert "computes nearly the same" in said and "--text FILE" in said
    grow(source, "--operator", *words, "--dry-run", "--json")
    assert json.loads(capsys.readouterr().out)["keeps_function"] is False
    assert (logits(tmp_path / "rounded") - logits(source)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--operator", "average", "--after", "2..3"], "grow: average: after 3 is not a place in 4 layers"),
        (
            ["--operator", "average", "--after", "9"],
            "after 9 is not a place in 4 layers; they go from 0 to 2",
        ),
        (["--operator", "avrage", "--after", "0"], "did you mean average?"),
        (["--operator", "average"], "grow: average: after is missing"),
        (["--operator", "average", "--after", "0", "t=1"], "unknown key t"),
        (["--operator", "widen", "d_ff=1"], "layer 0: target is narrower than the layer; use narrow"),
        (["--operator", "narrow", "d_ff=1000"], "target is wider than the layer; use widen"),
        (["--operator", "widen"], "give target (a list of layers), or n_heads"),
        (["--operator", "widen", "n_heads=5"], "layer 0: n_kv_heads is 2, which does not divide n_heads 5"),
        (
            ["--operator", "narrow", "d_ff=32", "importance=luck"],
            "importance is 'luck'; choose one of norm, first",
        ),
        (["--after", "0"], "name an --operator"),
        ([], "name an --operator"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(model, tmp_path, capsys, words, says):
    source = model()
    grow(source, tmp_path / "grown", *words, code=2)
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_damage_a_full_disk_and_numbers_that_are_not_finite_leave_nothing(model, tmp_path, capsys):
    source = model(replace(EQUAL, d_model=128))
    words = (source, tmp_path / "grown", "--operator", "average", "--after", "0")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        grow(*words, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert " needed, " in error and " free" in error and error.count("\n") == 1
    tensors = load_file(source / "model.safetensors")
    tensors["blocks.1.feedforward.up.weight"][0, 0] = torch.inf
    save_file(tensors, source / "model.safetensors")
    grow(*words, code=1)
    assert (
        "blocks.1.feedforward.up.weight came out with numbers that are not finite" in capsys.readouterr().err
    )
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-40])
    grow(*words, code=2)
    assert capsys.readouterr().err.startswith("entasis: damaged: ")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_weights_that_were_changed_are_refused(model, tmp_path, capsys):
    source = model()
    content = bytearray((source / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (source / "model.safetensors").write_bytes(content)
    grow(source, tmp_path / "grown", "--operator", "average", "--after", "0", code=2)
    assert "does not hold the weights that were saved" in capsys.readouterr().err
    assert not (tmp_path / "grown").exists()


def test_predicted_layers_come_with_their_diagnostics_and_a_warning(model, tmp_path, capsys):
    source = model()
    for name, extra in (("lesa", ["epochs=1"]), ("lesa_ridge", []), ("aligned_lesa", ["predictor=ridge"])):
        grow(source, tmp_path / name, "--operator", name, "--after", "1", *extra, "--json")
        out, err = capsys.readouterr()
        found = json.loads(out)["diagnostics"][name]
        assert found["held_out_layers"] == [1] or found["held_out_layers"] == [2]
        query = found["matrices"]["query"]
        assert query["size"] == [32, 32] and query["dropped"] == 0
        for who in ("predicted", "average"):
            assert set(query[who]) == {"cosine", "norm_ratio", "error", "effective_rank"}
        stored = json.loads((tmp_path / name / "provenance.json").read_text())
        assert stored["diagnostics"][name] == found
        assert all(f"warning: {name}: {line}" in err for line in found["warnings"])
        assert ("alignment" in found) == (name == "aligned_lesa")
        # To the bit from weights and seed, norms from the neighbours.
        grow(source, tmp_path / f"{name}-again", "--operator", name, "--after", "1", *extra)
        out, _ = capsys.readouterr()
        assert "as predicted, beside (the mean of their neighbours)" in out
        first, again = (load_file(tmp_path / n / "model.safetensors") for n in (name, f"{name}-again"))
        assert all(torch.equal(first[key], again[key]) for key in first)
        near = load_file(source / "model.safetensors")
        norm = "attention_norm.weight"
        mean = (near[f"blocks.1.{norm}"] + near[f"blocks.2.{norm}"]) / 2
        torch.testing.assert_close(first[f"blocks.2.{norm}"], mean)


PLAIN = replace(EQUAL, d_model=64, head_dim=16, vocabulary=384, norm_eps=1e-6)


@pytest.mark.parametrize("to", ["hf", "padded"])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": "full", "norm_placement": "reordered"}])
def test_a_grown_model_opens_in_transformers(model, tmp_path, to, changes):
    from transformers import AutoModelForCausalLM

    source, out = model(replace(PLAIN, **changes)), tmp_path / "out"
    grow(source, tmp_path / "grown", "--operator", "zero_average", "--after", "0,2")
    assert main(["export", str(tmp_path / "grown"), "--to", to, "--output", str(out)]) == 0
    opened = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(IDS).logits, logits(tmp_path / "grown"), atol=1e-4, rtol=1e-5)
    rows = json.loads((out / "entasis.json").read_text())["layers"]
    assert [row["new"] for row in rows] == [False, True, False, False, True, False]
    assert "| zero_average of 0 and 1 (new) |" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "shape", [PLAIN, replace(PLAIN, layers=(LayerShape(4, 2, 64), LayerShape(2, 1, 96)) * 2)]
)
def test_a_grown_model_opens_in_llama_cpp(model, tmp_path, shape):
    pytest.importorskip("xllamacpp", reason="llama.cpp's wheel xllamacpp is not installed")
    from tests.interop import judge_llama_cpp as llama_cpp

    source, out = model(shape), tmp_path / "out"
    grow(source, tmp_path / "grown", "--operator", "half_step", "--after", "1")
    assert main(["export", str(tmp_path / "grown"), "--to", "gguf", "--output", str(out)]) == 0
    # llama.cpp gives no log-probabilities of a token that is only part of a character.
    decode = tokenizer.load(source / "tokenizer.json").decode
    prompts = (
        (p, logits(tmp_path / "grown", p)[0, -1].log_softmax(-1)) for p in (IDS[:1, :n] for n in range(8, 40))
    )
    ids, ours = next((p, o) for p, o in prompts if decode([int(o.argmax())]) not in ("", "\ufffd"))
    server = llama_cpp.open_server(next(out.glob("*.gguf")))
    theirs = llama_cpp.log_probabilities(server, ids[0].tolist(), 5)
    assert len(set(theirs) & set(ours.topk(5).indices.tolist())) >= 4
    assert max(abs(ours[i].item() - value) for i, value in theirs.items()) < 5e-3


def test_the_folder_one_is_in_is_no_place_for_a_model_and_a_link_to_an_empty_one_is(
    model, tmp_path, capsys, monkeypatch
):
    source, words = model(), ("--operator", "average", "--after", "0")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    grow(source, ".", *words, code=2)
    assert "is the folder you are in; name another" in capsys.readouterr().err
    (tmp_path / "link").symlink_to("there")
    grow(source, tmp_path / "link", *words)
    assert weights.read_shape(tmp_path / "there").n_layers == 5 and (tmp_path / "link").is_symlink()


def test_layers_of_other_ffn_kinds_are_told_apart_by_the_operator(model, tmp_path, capsys):
    layers = (LayerShape(4, 2, 64), LayerShape(4, 2, 64, ffn=LayerFFN("gelu")))
    source = model(replace(EQUAL, layers=layers))
    grow(source, tmp_path / "grown", "--operator", "average", "--after", "0", code=2)
    error = capsys.readouterr().err
    assert (
        "grow: average: layer 0 has" in error and "d_ff 64 of swiglu" in error and "d_ff 64 of gelu" in error
    )


def test_room_is_looked_for_also_for_the_model_between_two_operators(model):
    source = model()
    operators = [
        growth.read_operator(name, options, "grow")
        for name, options in (("duplicate", {"after": [0]}), ("widen", {"d_ff": 128}))
    ]
    between, planned = (folder.plan_growth(source, operators[:n]) for n in (1, 2))
    assert planned.on_disk == between.bytes + planned.bytes and between.on_disk == between.bytes
