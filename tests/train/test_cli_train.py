import json
import shutil
import subprocess
import sys

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from entasis.cli import main
from entasis.train import recipe as recipes


@pytest.fixture
def written(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.to_yaml(recipe()))
    return path


def test_json_is_the_result_and_overrides_stand_anywhere(written, tmp_path, capsys):
    folder = tmp_path / "run"
    command = ["train", "--optimizer.lr=2e-2", str(written), "--output", str(folder), "tokens=1024", "--json"]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((folder / "result.json").read_text())
    assert told["tokens"] == 1024
    assert recipes.read(folder / "recipe.yaml").optimizer.lr == 2e-2


def test_printed_config_is_a_recipe_with_nothing_open(written, tmp_path, capsys):
    assert main(["train", str(written), "--print-config", "precision=auto", "batch.micro=auto"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    recipe = recipes.read(printed)
    assert recipe.precision in ("fp32", "bf16")
    assert recipe.batch.micro == 8
    assert len(recipe.stages) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizr.lr=1", "did you mean optimizer?"),
        ("data.train=nowhere", "nowhere: no corpus here"),
        ("shape.head_dim=7", "head_dim is 7; rotary positions need an even number"),
        ("logging.wandb=true", "wandb is not installed"),
        ("device=cuda", "no CUDA"),
        ("tokens=-3", "recipe: tokens is -3"),
    ],
)
def test_mistakes_exit_with_2_and_one_line_and_leave_no_folder(written, tmp_path, capsys, override, says):
    if override.startswith("device"):
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
    assert main(["train", str(written), override, "--output", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["shape.positions=learned", "samples={every: 4, tokens: 64}"], "samples are 65 tokens long"),
        (["data.sequence=128", "stages=[{sequence: 32}]"], "at which held-out text is scored: longer than"),
        (["optimizer.base_width=8"], "optimizer.base_width is muP's; set optimizer.parametrisation=mup"),
        (["optimizer.parametrisation=mup"], "parametrisation is mup; give optimizer.base_width"),
        (["stages=[{tokens: 1024}, {tokens: 1024, optimizer: {parametrisation: mup, base_width: 8}}]", "tokens=null"],
         "stages[1].optimizer.parametrisation: is the whole run's"),
        (["evaluation.every=0%"], "evaluation.every is 0"),
    ],
)  # fmt: skip
def test_what_would_end_a_run_in_its_middle_is_refused_before_it(written, tmp_path, capsys, overrides, says):
    assert main(["train", str(written), *overrides, "--output", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_held_out_text_that_cannot_be_divided_is_refused(written, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("A single document, long enough to be read.\n" * 40)
    command = ["data", "prepare", str(tmp_path / "one.txt"), "--tokenizer", "bytes", "--validation", "0"]
    assert main([*command, "--output", str(tmp_path / "one")]) == 0
    held_out = [f"data.validation={tmp_path / 'one/train'}", "evaluation.part=selection"]
    assert main(["train", str(written), *held_out, "--output", str(tmp_path / "run")]) == 2
    assert "one document cannot be divided" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_what_a_start_cannot_keep_is_refused_before_a_folder_is_begun(written, tmp_path, capsys):
    assert main(["train", str(written), "tokens=1024", "--output", str(tmp_path / "run")]) == 0
    start = [
        "train",
        str(written),
        "shape=null",
        f"start.from={tmp_path / 'run'}",
        "--output",
        str(tmp_path / "next"),
    ]
    for overrides, says in (
        (
            ["start.optimizer_state=keep", "optimizer.name=muon"],
            "are of another optimizer than muon; use reset",
        ),
        (["start.data_position=keep", "data.sequence=32"], "has none in this text at sequence 32"),
    ):
        assert main([*start, *overrides]) == 2
        assert says in capsys.readouterr().err and not (tmp_path / "next").exists()


def test_mup_from_weights_without_its_scales_is_noted(written, tmp_path, capsys):
    assert main(["train", str(written), "tokens=1024", "--output", str(tmp_path / "run")]) == 0
    mup = [
        "optimizer.parametrisation=mup",
        "optimizer.base_width=8",
        "shape=null",
        f"start.from={tmp_path / 'run'}",
    ]
    assert main(["train", str(written), *mup, "tokens=1024", "--output", str(tmp_path / "next")]) == 0
    assert (
        "logit_scale is 1.0 as the shape says, where muP has 0.25; the model to start from"
        in capsys.readouterr().err
    )


def test_a_stopped_run_goes_on_with_smaller_micro_batches(written, tmp_path, capsys):
    command = ["train", str(written), "--output", str(tmp_path / "run"), "checkpoint.every=4"]
    assert main(command) == 0
    whole = json.loads((tmp_path / "run" / "result.json").read_text())["loss"]
    for path in ("result.json", "model.safetensors", "checkpoints/step-00000008"):
        gone = tmp_path / "run" / path
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert main([*command, "batch.micro=2"]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["loss"] == pytest.approx(
        whole, rel=1e-4
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_a_mistake_is_one_line_under_torchrun(written, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [
        "-m",
        "entasis",
        "train",
        str(written),
        "data.train=nowhere",
        "--output",
        str(tmp_path / "run"),
    ]
    said = subprocess.run([*torchrun, *command], capture_output=True, text=True, check=False).stderr
    assert (
        said.count("nowhere: no corpus here") == 1
        and "Traceback" not in said.split("ChildFailedError")[0].split("elastic")[0]
    )


def test_a_truncated_shard_is_refused(written, corpora, tmp_path, capsys):
    shutil.copytree(corpora / "train", tmp_path / "cut")
    shard = next((tmp_path / "cut").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    command = ["train", str(written), f"data.train={tmp_path / 'cut'}", "--output", str(tmp_path / "run")]
    assert main(command) == 2
    assert "damaged or cut short" in capsys.readouterr().err


def test_corrupt_data_is_refused(written, corpora, tmp_path, capsys):
    """Tokens that were int32 and have been read as uint16: every other one is zero."""
    shutil.copytree(corpora / "train", tmp_path / "sick")
    shard = next((tmp_path / "sick").glob("*.safetensors"))
    with safe_open(shard, framework="np") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    tensors["tokens"][1::2] = 0
    save_file(tensors, shard, metadata=metadata)
    command = ["train", str(written), f"data.train={tmp_path / 'sick'}", "--output", str(tmp_path / "run")]
    assert main(command) == 2
    assert "is corrupt" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
