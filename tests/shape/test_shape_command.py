"""`entasis shape`, run as a user runs it."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from entasis.cli import main


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
