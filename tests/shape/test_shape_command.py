"""`entasis shape`, run as a user runs it."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib import resources
from pathlib import Path

import pytest

from entasis.cli import main, shape
from entasis.data.prepare import prepare
from entasis.shape import specification
from entasis.train import preflight, recipe


def entasis(*arguments):
    return subprocess.run([sys.executable, "-m", "entasis", *arguments], capture_output=True, text=True)


def test_json_has_the_promised_keys():
    answer = json.loads(entasis("shape", "crown-paper/crown-18", "--json").stdout)
    assert answer["parameters"] == 181_906_688
    assert answer["parameters_without_input_embedding"] == 143_273_216
    assert answer["kv_bytes_per_token"] == sum(2 * x["n_kv_heads"] * 64 * 2 for x in answer["layers"])
    assert {"n_heads", "n_kv_heads", "d_ff"} <= set(answer["layers"][0])
    assert answer["flops_per_token"] == 3 * answer["forward_flops_per_token"]


def test_several_shapes_give_a_list_and_a_drawing():
    names = ["smollm2/135m", "profile=crown,layers=6,d_model=128,vocabulary=4096,budget=8M"]
    answers = json.loads(entasis("shape", *names, "--json").stdout)
    assert [len(a["layers"]) for a in answers] == [30, 6]
    drawn = entasis("shape", *names)
    assert drawn.returncode == 0
    assert "134,515,008" in drawn.stdout
    assert "budget parameters 8,000,000" in drawn.stdout


def test_options_describe_a_shape_and_its_isotropic_twin():
    options = [
        "--profile",
        "crown",
        "--layers",
        "18",
        "--d-model",
        "768",
        "--budget",
        "180M",
        "--isotropic",
        "parameters",
    ]
    crown, twin = json.loads(entasis("shape", *options, "--json").stdout)
    assert abs(crown["parameters"] - twin["parameters"]) / 180e6 < 1e-3
    assert len({x["d_ff"] for x in twin["layers"]}) == 1


def test_a_figure_is_an_svg_and_nothing_is_overwritten(tmp_path):
    target = tmp_path / "columns.svg"
    assert entasis("shape", "crown-paper/crown-18", "--svg", str(target)).returncode == 0
    figure = ElementTree.parse(target).getroot()
    assert figure.tag.endswith("svg")
    told = [text.text for text in figure.iter("{http://www.w3.org/2000/svg}text")]
    assert told[1:4] == ["181,906,688 parameters", "18 layers, d_model 768", "FFN 768–3,072, heads 9–12"]
    assert told[4:] == ["attention", "FFN"]
    again = entasis("shape", "crown-paper/crown-18", "--svg", str(target))
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)


def test_a_shape_is_read_from_a_recipe_and_from_its_own_json(tmp_path):
    whole = json.loads(entasis("shape", "profile=crown,layers=4,d_model=64,head_dim=16", "--json").stdout)
    (tmp_path / "shape.json").write_text(json.dumps(whole["shape"]))
    assert json.loads(entasis("shape", str(tmp_path), "--json").stdout)["layers"] == whole["layers"]
    (tmp_path / "recipe.yaml").write_text("shape: {profile: crown, layers: 4, d_model: 64, head_dim: 16}\n")
    read = json.loads(entasis("shape", str(tmp_path / "recipe.yaml"), "--json").stdout)
    assert read["layers"] == whole["layers"]


def test_a_mistake_is_one_line_and_exit_code_2():
    for arguments in (["crown-paper/crown-81"], ["profile=crwon,layers=4,d_model=64"], [], ["nothing.json"]):
        done = entasis("shape", *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("entasis: ")
        assert done.stderr.count("\n") == 1


def test_neither_help_nor_shape_imports_torch():
    program = (
        "import sys, entasis.cli as c\n"
        "try: c.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'pandas', 'altair', 'scipy', 'numpy'} & set(sys.modules)))"
    )
    for arguments in (
        ["--help"],
        ["shape", "crown-paper/crown-18"],
        ["shape", "--profile", "crown", "--budget", "180M"],
    ):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        assert done.stdout.rstrip().endswith("[]"), done.stdout[-300:] + done.stderr


def test_a_budget_that_the_default_vocabulary_alone_exceeds_names_it(capsys):
    own = ["--profile", "crown", "--layers", "4", "--d-model", "256", "--budget", "5M"]
    assert main(["shape", *own]) == 2
    assert "vocabulary was left at its default of 50,304 rows" in capsys.readouterr().err
    assert main(["shape", *own, "--vocabulary", "50304"]) == 2
    assert "left at its default" not in capsys.readouterr().err


def test_a_profile_with_too_few_layers_to_show_is_told(capsys):
    own = ["--d-model", "64", "--vocabulary", "100", "--json", "--profile"]
    assert main(["shape", *own, "crown", "--layers", "2"]) == 0
    assert "2 layers are too few for crown: its ffn multipliers go from" in str(
        json.loads(capsys.readouterr().out)["notes"]
    )
    for profile, layers in (("crown", "9"), ("isotropic", "1"), ("vanilla", "2")):
        assert main(["shape", *own, profile, "--layers", layers]) == 0
        assert "too few" not in str(json.loads(capsys.readouterr().out)["notes"])


@pytest.mark.parametrize(
    ("options", "sequence"),
    [(["--sequence", "256"], 256), (["--set", "budget.sequence=512"], 512), ([], 1024)],
)
def test_a_budget_of_flops_and_what_is_printed_are_counted_at_one_length(capsys, options, sequence):
    own = ["--profile", "isotropic", "--layers", "4", "--d-model", "64", "--vocabulary", "100", "--json"]
    assert main(["shape", *own, "--budget", "flops_per_token=5M", *options]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sequence"] == sequence
    assert told["flops_per_token"] == pytest.approx(5e6, rel=0.02)
    assert told["miss"] == pytest.approx(told["flops_per_token"] / 5e6 - 1, abs=1e-9)


EXAMPLES = [line.strip() for line in shape.__doc__.splitlines() if line.startswith("  entasis ")]


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_of_the_help_runs(tmp_path, monkeypatch, example):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(example)[1:]) == 0


def told(capsys, *arguments):
    """The JSON answer."""
    assert main(["shape", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def complaint(capsys, *arguments):
    """The one line of a refusal."""
    assert main(["shape", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_json_names_each_shape_its_budget_and_a_layers_own_ffn(capsys, tmp_path):
    pairs = (
        "profile={ffn: isotropic, heads: crown},layers=4,d_model=64,vocabulary=100,budget.flops_per_token=5M"
    )
    own, crown = told(capsys, pairs + ",budget.sequence=1k", "crown-paper/crown-18")
    assert own["name"] == "ffn isotropic, heads crown"
    assert own["budget"] == {
        "kind": "flops_per_token",
        "value": 5_000_000,
        "sequence": 1000,
        "attended": "full",
        "achieved": own["flops_per_token"],
    }
    assert (crown["name"], crown["budget"]) == ("crown-paper/crown-18", None)
    layer = {"n_heads": 2, "n_kv_heads": 2, "d_ff": 64}
    layers = [layer, {**layer, "ffn": {"kind": "gelu"}}]
    (tmp_path / "shape.json").write_text(
        json.dumps({"d_model": 32, "head_dim": 16, "vocabulary": 100, "layers": layers})
    )
    rows = told(capsys, tmp_path)["layers"]
    assert [{k: v for k, v in row.items() if k in ("ffn", *layer)} for row in rows] == layers


def test_the_list_as_json_has_the_controls_that_profiles_take(capsys):
    controls = told(capsys, "--list")["controls"]
    assert controls == ["/reversed", "/shuffled:SEED"]
    for control in controls:
        told(capsys, f"profile=crown{control.replace('SEED', '3')},layers=4,d_model=64")


@pytest.mark.parametrize(
    ("pairs", "budgets"),
    [
        ("profile=crown,layers=18,d_model=768,rounding=crown-paper,q_per_kv=3", ("105M", "113M")),
        (
            "profile=vanilla,layers=16,d_model=1280,rounding=corenet,vocabulary=32000,tied_embeddings=true",
            ("120M", "138M"),
        ),
    ],
)
def test_a_budget_under_the_smallest_ffns_is_refused_and_none_is_removed(capsys, pairs, budgets):
    assert "with all that is solved for at its least" in complaint(capsys, f"{pairs},budget={budgets[0]}")
    answer = told(capsys, f"{pairs},budget={budgets[1]}")
    assert min(layer["d_ff"] for layer in answer["layers"]) == 256
    assert "smallest FFN, 256" in str(answer["notes"])


def test_an_isotropic_ffn_stays_isotropic_where_heads_differ(capsys):
    answer = told(
        capsys,
        "profile={ffn: isotropic, heads: crown},layers=12,d_model=512,n_kv_heads=4,tied_embeddings=true,"
        "vocabulary=32000,rounding=tensor-core,budget=30M",
    )
    assert len({layer["d_ff"] for layer in answer["layers"]}) == 1
    assert len({layer["n_heads"] for layer in answer["layers"]}) == 2


@pytest.mark.parametrize(
    "given",
    [
        ["crown-paper/crown-18"],
        ["profile=crown,layers=4,d_model=64"],
        [],
    ],
)
@pytest.mark.parametrize(
    ("option", "named"),
    [
        (["--tied"], "tied_embeddings"),
        (["--vocabulary", "64"], "vocabulary"),
        (["--set", "norm=layernorm"], "norm"),
    ],
)
def test_an_option_that_belongs_to_no_shape_is_refused_by_name(capsys, given, option, named):
    assert complaint(capsys, *given, *option).startswith(
        f"entasis: {named}: options describe a shape of their own"
    )


def test_what_belongs_to_the_shape_of_options_is_taken(capsys):
    own = ["--profile", "crown", "--layers", "4", "--d-model", "64"]
    _, answer = told(capsys, "crown-paper/crown-18", *own, "--tied")
    assert answer["shape"]["tied_embeddings"]
    assert "device is 'hoper'" in complaint(capsys, *own, "--device", "hoper")
    assert "scale is 'heads', and there is no budget" in complaint(capsys, *own, "--set", "scale=heads")


@pytest.mark.parametrize(
    ("sequence", "says"),
    [("null", "is None; write a number"), ("-5", "is -5; write a number"), ("0", "is 0; it must be from 1")],
)
def test_a_budgets_sequence_is_a_number_of_tokens(capsys, sequence, says):
    pairs = f"profile=crown,layers=4,d_model=64,vocabulary=100,budget.flops_per_token=5M,budget.sequence={sequence}"
    assert f"shape: budget.sequence {says}" in complaint(capsys, pairs)


def test_costs_are_shown_at_the_attended_length_of_the_budget(capsys):
    own = ["--profile", "isotropic", "--layers", "4", "--d-model", "64", "--vocabulary", "100"]
    budget = ["--budget", "flops_per_token=5M", "--sequence", "2048"]
    for options in (["--attended", "causal"], ["--set", "budget.attended=causal"]):
        answer = told(capsys, *own, *budget, *options)
        assert answer["attended"] == answer["budget"]["attended"] == "causal"
        assert answer["flops_per_token"] == answer["budget"]["achieved"] == pytest.approx(5e6, rel=0.02)
    assert main(["shape", *own, *budget, "--attended", "causal"]) == 0
    assert "budget flops_per_token 5,000,000 (T 2048, causal), achieved" in capsys.readouterr().out
    crown, twin = told(
        capsys,
        "crown-paper/crown-18",
        "--isotropic",
        "flops_per_token",
        "--sequence",
        "8192",
        "--attended",
        "causal",
    )
    assert twin["flops_per_token"] == pytest.approx(crown["flops_per_token"], rel=1e-3)
    assert twin["budget"]["value"] == crown["flops_per_token"]


def test_the_isotropic_model_of_equal_kv_cost(capsys):
    same, twin = told(capsys, "crown-paper/baseline-12", "--isotropic", "kv_bytes_per_token")
    assert twin["shape"] == same["shape"]
    crown, twin = told(capsys, "crown-paper/crown-18", "--isotropic", "kv_bytes_per_token")
    assert [x["n_kv_heads"] for x in twin["layers"]] == [3] * 18
    assert twin["miss"] == twin["kv_bytes_per_token"] / crown["kv_bytes_per_token"] - 1
    assert "nearest number of KV heads" in str(twin["notes"])


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    """A folder with the corpora `corpora/stdlib` that the shipped recipe names."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "text").mkdir()
    for name in ("bisect", "heapq", "keyword", "this", "sched"):
        shutil.copy(Path(os.__file__).with_name(f"{name}.py"), folder / "text")
    prepare([folder / "text"], folder / "corpora" / "stdlib", tokenizer="bytes", validation=0.2)
    return folder


TINY = resources.files("entasis.train").joinpath("recipes", "tiny.yaml").read_text(encoding="utf-8")


def test_a_recipe_is_priced_as_the_model_that_it_trains(capsys, monkeypatch, corpora):
    monkeypatch.chdir(corpora)
    Path("tiny.yaml").write_text(TINY)
    answer = told(capsys, "tiny.yaml")
    trained = preflight.resolve_with_data(recipe.read("tiny.yaml"))[1]
    assert answer["shape"] == json.loads(json.dumps(trained.to_dict()))
    assert trained.vocabulary < 1000
    scaled = TINY.replace(
        "name: adamw,", "name: adamw, parametrisation: mup, base_width: 32, base_head_dim: 16,"
    )
    Path("mup.yaml").write_text(scaled)
    trained = preflight.resolve_with_data(recipe.read("mup.yaml"))[1]
    assert told(capsys, "mup.yaml")["shape"] == json.loads(json.dumps(trained.to_dict()))
    assert trained.logit_scale == 32 / 128 and trained.attention_scale == 4 / 32
    mixture = TINY.replace(
        "train: corpora/stdlib/train", "train: {a: {path: corpora/stdlib/train, weight: 1}}"
    )
    Path("mixture.yaml").write_text(mixture)
    assert told(capsys, "mixture.yaml")["shape"] == answer["shape"]


def test_a_recipe_without_its_corpus_says_which_vocabulary_is_assumed(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    assumed = (
        "the vocabulary is assumed to be 50,304 rows: tiny.yaml names none, and its data.train, "
        "corpora/stdlib/train, is not prepared here"
    )
    assert complaint(capsys, "tiny.yaml").endswith(f"; {assumed}\n")
    Path("tiny.yaml").write_text(TINY.replace("1.6M", "8M"))
    answer = told(capsys, "tiny.yaml")
    assert assumed in answer["notes"]
    assert answer["shape"]["vocabulary"] == specification.DEFAULT_VOCABULARY
    Path("named.yaml").write_text(TINY.replace("budget: 1.6M", "budget: 1.6M, vocabulary: 4096"))
    assert told(capsys, "named.yaml")["notes"] == []


def test_a_recipe_that_starts_from_a_folder_has_its_shape(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    earlier = told(capsys, "profile=crown,layers=4,d_model=64,vocabulary=100")["shape"]
    Path("earlier").mkdir()
    Path("earlier/shape.json").write_text(json.dumps(earlier))
    Path("more.yaml").write_text("start: {from: earlier}\ndata: {train: corpora/train}\ntokens: 2M\n")
    assert told(capsys, "more.yaml")["shape"] == earlier
    Path("lost.yaml").write_text("start: {from: nowhere}\ndata: {train: corpora/train}\ntokens: 2M\n")
    assert "start.from is nowhere, which holds no shape.json" in complaint(capsys, "lost.yaml")
