"""Runs of several stages, and runs that start from weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

from entasis.data.prepare import prepare
from entasis.errors import UserError
from entasis.evaluate.loading import load
from entasis.shape import cost
from entasis.shape.selectors import select
from entasis.train import parallel
from entasis.train.metrics import records
from entasis.train.moments import RESTING
from entasis.train.preflight import check_settings
from entasis.train.resolve import resolve
from entasis.train.run import train

WIDER = [
    {"n_heads": 4, "n_kv_heads": 2, "d_ff": 100},
    {"n_heads": 4, "n_kv_heads": 2, "d_ff": 96},
]
CONSTANT = {"name": "constant", "warmup": 0}


def losses(folder):
    return [r["loss"] for r in records(folder)]


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_weights_go_on_where_the_other_run_ended(recipe, tmp_path):
    first = train(recipe(tokens=512 * 30), tmp_path / "first")
    second = train(
        recipe(shape=None, start={"from": str(tmp_path / "first")}, tokens=512 * 2, optimizer={"lr": 0.0}),
        tmp_path / "second",
    )
    assert second["validation"]["bits_per_byte"] == first["validation"]["bits_per_byte"]
    before, after = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.equal(before[name], after[name]) for name in before)
    told = json.loads((tmp_path / "second" / "environment.json").read_text())["start"]
    assert told["from"] == str(tmp_path / "first") and len(told["weights"]) == 64


def test_moments_and_position_make_two_runs_one(recipe, tmp_path):
    train(recipe(tokens=512 * 10, schedule=CONSTANT), tmp_path / "long")
    train(recipe(tokens=512 * 6, schedule=CONSTANT), tmp_path / "first")
    start = {"from": str(tmp_path / "first"), "optimizer_state": "keep"}
    train(recipe(tokens=512 * 4, schedule=CONSTANT, start=start), tmp_path / "second")
    assert losses(tmp_path / "first") + losses(tmp_path / "second") == losses(tmp_path / "long")
    a, b = weights(tmp_path / "long"), weights(tmp_path / "second")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_moments_are_not_both_kept_and_forgotten(recipe, tmp_path):
    train(recipe(tokens=512), tmp_path / "first")
    start = {"from": str(tmp_path / "first"), "optimizer_state": "keep"}
    stages = [{"tokens": 512, "optimizer_state": "reset"}]
    with pytest.raises(
        UserError, match=r"stages\[0\].optimizer_state is reset, and start.optimizer_state keep"
    ):
        train(recipe(tokens=None, start=start, stages=stages), tmp_path / "second")


def test_moments_of_what_rests_are_kept_and_resume_with_the_run(recipe, tmp_path):
    first, second = (
        {"tokens": 512 * 3, "trainable": "blocks[0]"},
        {"tokens": 512 * 2, "trainable": "blocks[1]"},
    )
    keep = {"optimizer_state": "keep"}
    settings = {"tokens": None, "schedule": CONSTANT, "checkpoint": {"every": 1, "keep_last": 9}}
    run = recipe(stages=[first, second | keep, first | keep], **settings)
    train(run, tmp_path / "whole")
    steps = load_file(tmp_path / "whole/optimizer.safetensors")
    assert steps["step:blocks.0.attention.query.weight"] == 6
    for step in (3, 4, 5):  # before, within and after the stage in which the first layer rests
        folder = tmp_path / f"stopped-{step}"

        def stop(event, step=step):
            if event["event"] == "checkpoint" and event["step"] == step:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(run, folder, reporter=stop)
        assert (folder / f"checkpoints/step-0000000{step}" / RESTING).exists() == (step != 3)
        train(run, folder)
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    train(recipe(stages=[first, second | keep, first], **settings), tmp_path / "reset")
    assert not list((tmp_path / "reset").rglob(RESTING))  # none goes on with them
    assert load_file(tmp_path / "reset/optimizer.safetensors")["step:blocks.0.attention.query.weight"] == 3


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([{"optimizer_state": "keep"}, {}], r"stages\[0\]\.optimizer_state is keep, but no stage is before it; write start"),
        ([{}, {"optimizer_state": "keep", "optimizer": {"name": "muon"}}], r"stages\[1\].*has another optimizer"),
    ],
)  # fmt: skip
def test_moments_that_are_not_there_are_refused_before_the_first_step(recipe, tmp_path, stages, says):
    with pytest.raises(UserError, match=says):
        train(recipe(tokens=None, stages=[{"tokens": 512, **s} for s in stages]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_position_may_be_kept_without_the_moments(recipe, tmp_path):
    train(recipe(tokens=512 * 4, schedule=CONSTANT), tmp_path / "long")
    train(recipe(tokens=512 * 2, schedule=CONSTANT), tmp_path / "first")
    start = {"from": str(tmp_path / "first"), "data_position": "keep"}
    train(recipe(tokens=512 * 2, schedule=CONSTANT, start=start), tmp_path / "second")
    again, long = losses(tmp_path / "second"), losses(tmp_path / "long")
    assert again[0] == long[2] and again[1] != long[3]


def test_a_kept_checkpoint_is_a_start_too(recipe, tmp_path):
    kept = {"every": 2, "keep_every": 6}
    train(recipe(tokens=512 * 10, schedule=CONSTANT, checkpoint=kept), tmp_path / "long")
    start = {"from": str(tmp_path / "long/checkpoints/step-00000006"), "optimizer_state": "keep"}
    train(recipe(tokens=512 * 4, schedule=CONSTANT, start=start), tmp_path / "second")
    assert losses(tmp_path / "second") == losses(tmp_path / "long")[6:]


def test_every_number_of_a_group_comes_from_the_stage(recipe, tmp_path):
    train(recipe(tokens=512 * 6, schedule=CONSTANT, optimizer={"lr": 1e-2}), tmp_path / "first")
    start = {"from": str(tmp_path / "first"), "optimizer_state": "keep"}
    train(recipe(tokens=512 * 2, schedule=CONSTANT, optimizer={"lr": 0.0}, start=start), tmp_path / "still")
    a, b = weights(tmp_path / "first"), weights(tmp_path / "still")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert records(tmp_path / "still")[0]["lr"] == 0.0


def test_a_widened_model_begins_as_the_one_before(recipe, tmp_path):
    stages = [
        {"tokens": 512 * 20},
        {"tokens": 512 * 4, "lr": 0.0, "transition": {"resize": {"layers": WIDER}}},
    ]
    result = train(recipe(tokens=None, stages=stages, evaluation={"every": 20}), tmp_path / "run")
    middle = records(tmp_path / "run")[19]["validation_bits_per_byte"]
    assert result["validation"]["bits_per_byte"] == pytest.approx(middle, abs=1e-5)
    assert weights(tmp_path / "run")["blocks.0.feedforward.up.weight"].shape[0] == 100
    assert [layer["sources"] for layer in result["layers"]] == [[0], [1]]
    assert load(tmp_path / "run").shape.layers[0].d_ff == 100


def test_moments_go_through_a_transition(recipe, tmp_path):
    """With lr 0 afterwards they only decay: the kept ones are the old run's times beta, the new units have their own."""
    same = {"tokens": 512 * 4, "schedule": CONSTANT}
    wider = {
        **same,
        "lr": 0.0,
        "tokens": 512,
        "transition": {"resize": {"layers": WIDER, "new_units": "zeros"}},
    }
    train(recipe(tokens=None, stages=[same, {**wider, "optimizer_state": "keep"}]), tmp_path / "kept")
    train(recipe(tokens=None, stages=[same, wider]), tmp_path / "reset")
    kept, reset = (load_file(tmp_path / name / "optimizer.safetensors") for name in ("kept", "reset"))
    assert kept["step:norm.weight"] == 5 and reset["step:norm.weight"] == 1
    assert kept["exp_avg:blocks.0.feedforward.up.weight"].shape == (100, 32)


def test_repeated_layers_are_new_and_have_ids_of_their_own(recipe, tmp_path):
    layers = [WIDER[1]] * 3
    stages = [
        {"tokens": 512 * 4},
        {
            "tokens": 512 * 2,
            "transition": {"resize": {"layers": layers, "sources": [0, 1, 1]}},
            "trainable": "newest",
        },
    ]
    result = train(recipe(tokens=None, stages=stages), tmp_path / "run")
    assert [(x["id"], x["new"], x["frozen"], x["sources"]) for x in result["layers"]] == [
        (0, False, True, [0]), (1, False, True, [1]), (2, True, False, [1]),
    ]  # fmt: skip
    found = weights(tmp_path / "run")
    assert not torch.equal(found["blocks.2.feedforward.up.weight"], found["blocks.1.feedforward.up.weight"])
    moments = load_file(tmp_path / "run" / "optimizer.safetensors")
    assert {key.split(":")[1].split(".")[1] for key in moments} == {"2"}


def test_a_stage_s_flops_are_what_it_computes(recipe, tmp_path):
    stages = [{"tokens": 512 * 2}, {"tokens": 512 * 6, "trainable": "head"}]
    result = train(recipe(tokens=None, stages=stages), tmp_path / "run")
    shape = load(tmp_path / "run").shape
    head = cost.stage_flops_per_token(shape, select(shape, "head"), 64)
    assert result["flops_per_token"] == round((cost.flops_per_token(shape, 64) + 3 * head) / 4)
    assert head < 0.7 * cost.flops_per_token(shape, 64)


def test_stages_read_other_data_at_other_lengths_and_come_back(recipe, corpora, tmp_path):
    stages = [
        {"tokens": 512 * 2},
        {"tokens": 512 * 2, "sequence": 32},
        {"tokens": 256 * 4, "batch": {"tokens": 256}},
    ]
    result = train(recipe(tokens=None, stages=stages), tmp_path / "run")
    assert result["tokens"] == 512 * 4 + 1024 and result["steps"] == 8
    assert [r["tokens"] for r in records(tmp_path / "run")][-2:] == [512 * 4 + 768, 512 * 4 + 1024]
    states = sorted((tmp_path / "run/checkpoints").iterdir())[-1] / "state.json"
    positions = json.loads(states.read_text())["positions"]
    assert sorted(positions.values()) == [2 * 8 + 4 * 4, 2 * 16]


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ({"transition": {"resize": {"layers": WIDER[:1]}}}, "2 layers cannot become 1"),
        ({"transition": {"grwo": {}}}, "stages[1].transition: 'grwo' is not known; did you mean grow?"),
        ({"transition": {"resize": {"layer": []}}}, "did you mean layers?"),
        ({"transition": {"resize": {"layers": [{"n_heads": 3, "n_kv_heads": 2, "d_ff": 1}] * 2}}}, "layer 0"),
        ({"trainable": "blocks[2:]"}, "stages[1].trainable: no parameter matches 'blocks[2:]'"),
        ({"trainable": "newest"}, "no layer was added before this stage"),
        ({"lr": 1, "optimizer": {"lr": 2}}, "gives both lr and optimizer.lr"),
        ({"optimizer": {"lrr": 2}}, "did you mean lr?"),
        ({"sequence": 65}, "batch.tokens is 512, not a multiple of data.sequence 65"),
        ({"data": {"train": "nowhere"}}, "nowhere: no corpus here"),
        ({"schedule": {"warmup": 9}}, "exceed the 4 steps"),
    ],
)
def test_a_mistake_in_stage_two_is_refused_before_stage_one(recipe, tmp_path, stage, says):
    with pytest.raises(UserError) as caught:
        train(recipe(tokens=None, stages=[{"tokens": 2048}, {"tokens": 2048, **stage}]), tmp_path / "run")
    assert says in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_too_little_activation_memory_for_stage_two_is_refused_before_stage_one(recipe, tmp_path):
    wide = {"resize": {"layers": [WIDER[0], {**WIDER[1], "d_ff": 4000}]}}
    stages = [{"tokens": 2048}, {"tokens": 2048, "transition": wide}]
    with pytest.raises(UserError, match=r"activation_memory is 2\.4 MiB, but 512 tokens at once need"):
        train(recipe(tokens=None, stages=stages, activation_memory="2.5MB"), tmp_path / "run")
    assert not records(tmp_path / "run")


@pytest.mark.parametrize("stage", [{"lora": {"rank": 2}, "trainable": "head"}, {"cache_frozen": True}])
def test_what_needs_the_whole_model_is_refused_sharded(recipe, monkeypatch, stage):
    monkeypatch.setattr(parallel, "world", lambda: 2)
    wanted = recipe(
        tokens=None, stages=[{"tokens": 2048}, {"tokens": 2048, **stage}], parallel={"kind": "fsdp"}
    )
    with pytest.raises(UserError, match="needs every process to hold the whole model"):
        check_settings(wanted, torch.device("cpu"))


def test_a_run_begun_by_one_process_is_not_resumed_in_shards_by_two(recipe, tmp_path, monkeypatch):
    stages = [{"tokens": 2048, "trainable": "blocks[1]", "cache_frozen": True}]
    wanted = recipe(tokens=None, stages=stages, parallel={"kind": "fsdp"}, checkpoint={"every": 2})

    def stop(event):
        if event["event"] == "checkpoint":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(wanted, tmp_path / "run", reporter=stop)
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(parallel, "broadcast_object", lambda value: value)
    with pytest.raises(UserError, match="cache_frozen needs every process to hold the whole model"):
        train(wanted, tmp_path / "run")


def test_a_start_that_does_not_fit_is_refused_before_training(recipe, tmp_path, corpora):
    train(recipe(), tmp_path / "first")
    start = {"from": str(tmp_path / "first")}
    with pytest.raises(UserError, match="which holds no model"):
        train(recipe(shape=None, start={"from": "nowhere"}), tmp_path / "run")
    with pytest.raises(UserError, match="shape is another than that of"):
        other = {**recipe().shape, "layers": WIDER}
        train(recipe(shape=other, start=start), tmp_path / "run")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some other words\n" * 4000)
    prepare([tmp_path / "text"], tmp_path / "other", train_tokenizer=260, validation=0)
    with pytest.raises(UserError, match="another tokenizer than the model"):
        data = {"train": str(tmp_path / "other" / "train"), "validation": None}
        train(recipe(shape=None, start=start, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_stages_take_shares_of_the_tokens_and_the_last_what_is_left(recipe, corpora):
    stages = [{"tokens": "33%"}, {"tokens": "30%"}, {}]
    resolved, _, _ = resolve(recipe(tokens=512 * 10, stages=stages), 257)
    assert [s.tokens for s in resolved.stages] == [512 * 3, 512 * 3, 512 * 4]
    with pytest.raises(
        UserError, match=r"stages\[0\].tokens is '33%', a share of tokens, which says nothing"
    ):
        resolve(recipe(tokens=None, stages=stages), 257)
    with pytest.raises(
        UserError, match="the stages before the last take 5,120 tokens, no fewer than there are"
    ):
        resolve(recipe(tokens=512 * 10, stages=[{"tokens": "100%"}, {}]), 257)
    with pytest.raises(UserError, match=r"stages\[0\].tokens is '0%', which is no step"):
        resolve(recipe(tokens=512 * 10, stages=[{"tokens": "0%"}, {}]), 257)
