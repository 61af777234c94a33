import json
import shutil

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
