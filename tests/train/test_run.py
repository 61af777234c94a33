"""What a run does and leaves; see test_kill_and_resume.py for what interruption leaves."""

import hashlib
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from entasis.errors import Damaged, Failure, UserError
from entasis.model import weights
from entasis.train import run_folder, stage_runner
from entasis.train.metrics import records
from entasis.train.recipe import read
from entasis.train.resolve import resolve
from entasis.train.resolved_recipe import read_stored
from entasis.train.run import train


def losses(folder) -> list[float]:
    return [row["loss"] for row in records(folder)]


def test_a_run_learns_and_leaves_a_whole_folder(recipe, tmp_path):
    events = []
    result = train(recipe(tokens=512 * 60), tmp_path / "run", reporter=events.append)
    curve = losses(tmp_path / "run")
    assert len(curve) == 60
    assert curve[-1] < curve[0] - 1.5
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "recipe.yaml", "shape.json", "environment.json", "tokenizer.json", "metrics.jsonl", "checkpoints",
        "model.safetensors", "optimizer.safetensors", "validation.safetensors", "result.json", ".lock",
    }  # fmt: skip
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["parameters"] == sum(
        x.numel() for x in load_file(tmp_path / "run" / "model.safetensors").values()
    )
    documents = load_file(tmp_path / "run" / "validation.safetensors")
    assert documents["document_nll"].sum().item() == pytest.approx(result["validation"]["nll"])
    assert documents["document_bytes"].sum().item() == result["validation"]["bytes"]
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 61))
    assert all({"step", "steps", "tokens"} <= set(event) for event in events)
    assert result["data_wait"] < 0.05


def test_a_finished_run_answers_without_training(recipe, tmp_path):
    first = train(recipe(), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    assert train(recipe(), tmp_path / "run") == first
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == before


def test_the_runs_own_recipe_repeats_it_exactly(recipe, tmp_path):
    train(recipe(precision="auto", compile="auto", attention="auto", device="auto"), tmp_path / "a")
    again = read(tmp_path / "a" / "recipe.yaml")
    assert "auto" not in (again.precision, again.compile, again.attention, again.device, again.batch.micro)
    train(again, tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert (tmp_path / "a" / "recipe.yaml").read_text() == (tmp_path / "b" / "recipe.yaml").read_text()


def test_another_recipe_in_the_same_folder_is_refused(recipe, tmp_path):
    train(recipe(), tmp_path / "run")
    with pytest.raises(UserError, match=r"another recipe \(optimizer.lr is 0.01 there and 0.1 here\)"):
        train(recipe(optimizer={"lr": 0.1}), tmp_path / "run")


def test_a_folder_of_something_else_is_refused(recipe, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not empty and holds no run"):
        train(recipe(), tmp_path)


def test_validation_during_training_changes_nothing(recipe, tmp_path):
    train(recipe(), tmp_path / "a")
    train(recipe(evaluation={"every": 2}, checkpoint={"every": 3}), tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert [row["step"] for row in records(tmp_path / "b") if "validation_bits_per_byte" in row] == [2, 4, 6]


def test_accumulation_gives_the_same_curve_within_rounding(recipe, tmp_path):
    train(recipe(batch={"micro": 8}), tmp_path / "a")
    train(recipe(batch={"micro": 2}), tmp_path / "b")
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)


def test_bf16_follows_fp32_with_weights_kept_in_fp32(recipe, tmp_path):
    # Few tokens: a CPU without matrix units for bf16 is a hundred times slower with it.
    few = {"tokens": 128 * 4, "batch": {"tokens": 128}, "data": {"validation": None}}
    train(recipe(**few), tmp_path / "fp32")
    train(recipe(**few, precision="bf16"), tmp_path / "bf16")
    assert losses(tmp_path / "fp32") == pytest.approx(losses(tmp_path / "bf16"), rel=0.01)
    assert losses(tmp_path / "fp32") != losses(tmp_path / "bf16")
    weights = load_file(tmp_path / "bf16" / "model.safetensors").values()
    assert {x.dtype for x in weights} == {torch.float32}


@pytest.mark.parametrize("optimizer", [{"name": "muon"}, {"parametrisation": "mup", "base_width": 16}])
def test_other_optimizers_learn_and_resume_to_the_bit(recipe, tmp_path, optimizer):
    def interrupt(event):
        if event["event"] == "step" and event["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    wanted = {"tokens": 512 * 12, "optimizer": optimizer}
    train(recipe(**wanted), tmp_path / "whole")
    with pytest.raises(Failure, match="stopped at step"):
        train(recipe(**wanted), tmp_path / "run", reporter=interrupt)
    train(recipe(**wanted), tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.5


def test_seed_changes_weights_and_order(recipe, tmp_path):
    train(recipe(), tmp_path / "a")
    train(recipe(seed=1), tmp_path / "b")
    assert losses(tmp_path / "a")[0] != losses(tmp_path / "b")[0]


def test_document_masking_changes_what_is_seen(recipe, tmp_path):
    train(recipe(tokens=512 * 40), tmp_path / "a")
    train(recipe(tokens=512 * 40, data={"document_masking": True}), tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


def test_a_stage_trains_only_what_it_names(recipe, tmp_path):
    both = [
        {"tokens": 512 * 4},
        {"tokens": 512 * 4, "trainable": ["blocks.1.*"], "schedule": {"name": "constant", "warmup": 0}},
    ]
    train(recipe(tokens=512 * 4, schedule={"decay": 0}), tmp_path / "first")
    train(recipe(tokens=None, stages=both, schedule={"decay": 0}), tmp_path / "both")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "both"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("blocks.1.")}
    assert losses(tmp_path / "both")[:4] == losses(tmp_path / "first")


def test_a_stage_keeps_no_gradient_of_a_frozen_head(recipe, tmp_path):
    """One of the size of the head, in fp32, would be made in every forward pass and kept until the backward pass."""

    def kept(name: str, **changes) -> list[torch.Size]:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
            few = {"tokens": 8192, "batch": {"tokens": 8192, "micro": 128}, "data": {"validation": None}}
            train(recipe(**few, **changes), tmp_path / name)
        return sizes

    everything = kept("all")
    head = load_file(tmp_path / "all" / "model.safetensors")["head.weight"].shape
    assert head in everything
    assert head not in kept("frozen", stages=[{"trainable": ["blocks.*"]}])


def test_a_stage_that_names_nothing_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match=r"no parameter matches 'block.1.*'; did you mean blocks"):
        train(recipe(stages=[{"trainable": ["block.1.*"]}]), tmp_path / "run")


def test_interrupt_saves_and_says_how_to_go_on(recipe, tmp_path):
    def interrupt(event):
        if event["event"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    train(recipe(), tmp_path / "whole")
    with pytest.raises(Failure, match=r"stopped at step \d of 8; a checkpoint is saved"):
        train(recipe(), tmp_path / "run", reporter=interrupt)
    assert 3 <= len(losses(tmp_path / "run")) < 8
    train(recipe(), tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_non_finite_loss_stops_before_the_update_and_names_the_layer(recipe, tmp_path, monkeypatch):
    built = []

    class Broken(stage_runner.Transformer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            built.append(self)

    def poison(event):
        if event["event"] == "step" and event["step"] == 4:
            # An overflow, not a bad weight: all are finite, the product of gate and up is not.
            with torch.no_grad():
                built[0].blocks[1].feedforward.gate.weight.fill_(1e30)
                built[0].blocks[1].feedforward.up.weight.fill_(1e30)
            built.append({name: p.clone() for name, p in built[0].named_parameters()})

    monkeypatch.setattr(stage_runner, "Transformer", Broken)
    with pytest.raises(Failure, match=r"non-finite loss at step 5.*blocks\.1\.feedforward\.down"):
        train(recipe(), tmp_path / "run", reporter=poison)
    assert all(torch.equal(p, built[1][name]) for name, p in built[0].named_parameters())
    assert len(losses(tmp_path / "run")) == 4


def test_out_of_memory_names_the_setting(recipe, tmp_path):
    def exhaust(event):
        if event["event"] == "step":
            torch.empty(1 << 60, dtype=torch.uint8)

    with pytest.raises(Failure, match=r"out of memory at step \d: lower batch.micro \(now 8 sequences of 64"):
        train(recipe(), tmp_path / "run", reporter=exhaust)


def test_wrong_vocabulary_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match=r"vocabulary is 1000, but the tokenizer has \d+ ids"):
        train(recipe(shape={**recipe().shape, "vocabulary": 1000}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_data_in_the_same_place_is_refused_on_resume(recipe, corpora, tmp_path):
    shutil.copytree(corpora / "train", tmp_path / "corpus")
    wanted = recipe(data={"train": str(tmp_path / "corpus")})
    train(wanted, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "corpus")
    shutil.copytree(corpora / "validation", tmp_path / "corpus")
    with pytest.raises(UserError, match="the train data has changed"):
        train(wanted, tmp_path / "run")


def test_auto_follows_what_was_chosen_when_the_run_began(recipe, tmp_path):
    train(recipe(precision="bf16", batch={"micro": 2}), tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    open_ = resolve(recipe(precision="auto", batch={"micro": "auto"}), 0)[0]
    found = run_folder.recognise(open_, tmp_path / "run")
    assert (found.precision, found.batch.micro) == ("bf16", 2)
    with pytest.raises(UserError, match="precision is 'bf16' there and 'fp32' here"):
        run_folder.recognise(resolve(recipe(), 0)[0], tmp_path / "run")


def test_a_run_s_recipe_leaves_nothing_to_the_machine(recipe, tmp_path):
    train(recipe(precision="auto", attention="auto", compile="auto", device="auto"), tmp_path / "run")
    stored = read_stored(tmp_path / "run" / "recipe.yaml")
    assert "auto" not in (
        stored.batch.micro,
        stored.precision,
        stored.attention,
        stored.compile,
        stored.device,
    )
    written = (tmp_path / "run" / "recipe.yaml").read_text()
    (tmp_path / "run" / "recipe.yaml").write_text(written.replace("precision: fp32", "precision: auto"))
    with pytest.raises(Damaged, match="precision is 'auto'; it must be fp32 or bf16"):
        train(recipe(), tmp_path / "run")


def test_flex_attention_is_refused_where_it_cannot_learn(recipe, tmp_path):
    with pytest.raises(UserError, match="attention is flex, which trains on CUDA"):
        train(recipe(attention="flex"), tmp_path)


def test_the_same_seed_reads_the_same_text_whatever_the_model(recipe, tmp_path, monkeypatch):
    """By hashes of the batches that reach the update."""
    read: dict[str, list[str]] = {}
    update = stage_runner.StageRunner.update

    def watched(self, batch, *rest):
        read[now].append(hashlib.sha256(batch.tokens_BT.numpy().tobytes()).hexdigest())
        return update(self, batch, *rest)

    monkeypatch.setattr(stage_runner.StageRunner, "update", watched)
    layers = [{"n_heads": 1, "n_kv_heads": 1, "d_ff": 20}] * 3
    arms = {
        "plain": {},
        "other shape": {"shape": {**recipe().shape, "layers": layers}},
        "other rate": {"optimizer": {"lr": 1e-3}},
        "other seed": {"seed": 1},
    }
    for now, changes in arms.items():
        read[now] = []
        train(recipe(**changes), tmp_path / now)
    assert len(set(read["plain"])) == 8
    assert read["plain"] == read["other shape"] == read["other rate"]
    assert not set(read["plain"]) & set(read["other seed"])


def test_a_tied_model_is_saved_once_and_loaded_tied(recipe, tmp_path):
    train(recipe(shape={**recipe().shape, "tied_embeddings": True}), tmp_path / "run")
    with safe_open(tmp_path / "run" / "model.safetensors", framework="pt") as file:
        assert "head.weight" not in file.keys() and "embedding.tokens.weight" in file.keys()  # noqa: SIM118
    model = weights.load(tmp_path / "run")
    assert model.head_weight is model.embedding.tokens.weight
    start = {"from": str(tmp_path / "run")}
    again = train(recipe(shape=None, start=start, tokens=512, optimizer={"lr": 0.0}), tmp_path / "again")
    assert again["validation"] == json.loads((tmp_path / "run" / "result.json").read_text())["validation"]
