"""Runs that grow on the way, and runs that start from grown models."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from entasis.cli import main
from entasis.errors import UserError
from entasis.model import weights
from entasis.model.initialisation import draw
from entasis.train.metrics import records
from entasis.train.run import train

CONSTANT = {"name": "constant", "warmup": 0}
EQUAL = [{"n_heads": 4, "n_kv_heads": 2, "d_ff": 64}] * 3


@pytest.fixture
def growing(recipe):
    """A recipe of equal layers, in stages: `growing({"tokens": …}, {"transition": …})`."""

    def make(*stages, **changes):
        shape = {**recipe().shape, "layers": EQUAL}
        return recipe(shape=shape, tokens=None, stages=list(stages), schedule=CONSTANT, **changes)

    return make


def grown(operator, **options):
    return {"transition": {"grow": {"operator": operator, **options}}, "tokens": 512 * 3}


def test_a_run_grows_trains_the_newest_and_then_everything(growing, tmp_path):
    stages = [
        {"tokens": 512 * 6},
        {**grown("llama_pro", after="top:1"), "trainable": "newest"},
        {"tokens": 512 * 2, "trainable": "all"},
    ]
    result = train(growing(*stages, evaluation={"every": 3}), tmp_path / "run")
    assert [(x["id"], x["sources"], x["operator"], x["new"]) for x in result["layers"]] == [
        (0, [0], None, False), (1, [1], None, False), (3, [1], "llama_pro", True), (2, [2], None, False),
    ]  # fmt: skip
    found = records(tmp_path / "run")
    assert [r["stage"] for r in found] == [0] * 6 + [1] * 3 + [2] * 2
    state = sorted((tmp_path / "run/checkpoints").iterdir())[-1] / "state.json"
    assert json.loads(state.read_text())["provenance"]["layers"] == result["layers"]


def test_a_fresh_layer_is_drawn_as_the_run_draws(growing, tmp_path):
    stages = [{"tokens": 512}, {**grown("append_random", count=1), "tokens": 512, "lr": 0.0}]
    optimizer = {"parametrisation": "mup", "base_width": 8}
    train(growing(*stages, init="nested", optimizer=optimizer), tmp_path / "run")
    shape, name = weights.read_shape(tmp_path / "run"), "blocks.3.feedforward.up.weight"
    assert shape.n_layers == 4
    after = load_file(tmp_path / "run/model.safetensors")[name]
    drawn = {
        (nested, mup): dict(draw(shape, [name], 0, parametrisation=mup, base_width=8 if mup == "mup" else None, nested=nested))[name]
        for nested in (True, False)
        for mup in ("mup", "standard")
    }  # fmt: skip
    assert torch.equal(after, drawn[True, "mup"])
    # On disk it follows the run that the model comes from.
    assert (
        main(
            ["grow", str(tmp_path / "run"), str(tmp_path / "grown"), "--operator", "append_random", "count=1"]
        )
        == 0
    )
    (again,) = dict(
        draw(
            weights.read_shape(tmp_path / "grown"),
            [name.replace("3", "4")],
            0,
            parametrisation="mup",
            base_width=8,
            nested=True,
        )
    ).values()
    assert torch.equal(load_file(tmp_path / "grown/model.safetensors")[name.replace("3", "4")], again)


def test_every_growth_of_a_run_is_told_and_newest_outlives_what_adds_no_layer(growing, tmp_path):
    stages = [
        {"tokens": 512},
        {**grown("append_last", count=1), "tokens": 512},
        {**grown("append_random", count=1), "tokens": 512},
        {"tokens": 512, "transition": {"scale": {"layers": [0]}}, "trainable": "newest"},
    ]
    result = train(growing(*stages), tmp_path / "run")
    assert [row["history"] for row in result["layers"]] == [
        [], [], [], [{"operator": "append_last", "from": [2]}], [{"operator": "append_random", "from": []}],
    ]  # fmt: skip
    assert [(row["new"], row["frozen"]) for row in result["layers"]] == [(False, True)] * 4 + [(True, False)]


def test_growing_by_a_silent_layer_changes_no_loss_and_frozen_layers_stay(growing, tmp_path):
    start = {"tokens": 512 * 6}
    kept = {"every": 6, "keep_every": 6}
    train(growing({"tokens": 512 * 7}, checkpoint=kept), tmp_path / "longer")
    still = {**grown("llama_pro", after=[0, 1]), "tokens": 512, "trainable": "newest"}
    train(growing(start, still), tmp_path / "run")
    a, b = ([r["loss"] for r in records(tmp_path / name)] for name in ("longer", "run"))
    assert b[:6] == a[:6] and b[6] == pytest.approx(a[6], abs=1e-5)
    before = load_file(tmp_path / "longer/checkpoints/step-00000006/model.safetensors")
    after = load_file(tmp_path / "run/model.safetensors")
    for name in ("embedding.tokens.weight", "blocks.0.attention.query.weight", "norm.weight"):
        assert torch.equal(after[name], before[name]), name
    assert after["blocks.1.feedforward.down.weight"].abs().max() > 0


def test_moments_of_what_survives_are_kept_by_default_and_reset_by_option(growing, tmp_path):
    def steps(name, **changes):
        train(growing({"tokens": 512 * 4}, {**grown("average", after=[0]), **changes}), tmp_path / name)
        found = load_file(tmp_path / name / "optimizer.safetensors")
        return {
            key.removeprefix("step:blocks.").split(".")[0]: int(x)
            for key, x in found.items()
            if key.startswith("step:blocks")
        }

    assert steps("kept") == {"0": 7, "1": 3, "2": 7, "3": 7}
    assert set(steps("reset", optimizer_state="reset").values()) == {3}
    assert set(steps("other", optimizer={"name": "muon"}).values()) == {3}  # vectors, by AdamW


@pytest.mark.parametrize("adapters", [False, True])
def test_only_new_layers_warm_up(growing, tmp_path, adapters):
    """In the first of four steps their rate is a quarter: AdamW's first update, of the size of the rate, shows it."""

    def moved(name, **changes):
        stage = {
            **grown("append_random", count=1),
            "tokens": 512,
            "optimizer": {"weight_decay": 0.0, "lr": 1e-4},
            **({"lora": {"rank": 2}, "trainable": "head"} if adapters else {}),
        }
        train(growing({"tokens": 512}, {**stage, "optimizer_state": "reset", **changes}), tmp_path / name)
        return load_file(tmp_path / name / "model.safetensors")

    still = moved("still", lr=0.0, optimizer={"weight_decay": 0.0})
    full, warm = moved("full"), moved("warm", warmup_new=4)
    for layer, share in ((0, 1.0), (3, 0.25)):
        key = f"blocks.{layer}.feedforward.up.weight"
        ratio = (warm[key] - still[key]).norm() / (full[key] - still[key]).norm()
        assert ratio == pytest.approx(share, rel=1e-2), layer


def test_a_grown_folder_knows_its_newest_layers(growing, recipe, tmp_path):
    train(growing({"tokens": 512 * 2}), tmp_path / "small")
    words = [
        "grow",
        str(tmp_path / "small"),
        str(tmp_path / "grown"),
        "--operator",
        "duplicate",
        "--after",
        "1",
    ]
    assert main(words) == 0
    stages = [{"tokens": 512, "trainable": "newest"}, {"tokens": 512}]
    result = train(
        recipe(shape=None, tokens=None, stages=stages, start={"from": str(tmp_path / "grown")}),
        tmp_path / "run",
    )
    assert [(x["id"], x["new"], x["operator"]) for x in result["layers"]] == [
        (0, False, None), (1, False, None), (3, True, "duplicate"), (2, False, None),
    ]  # fmt: skip
    first, last = (
        load_file(tmp_path / "grown/model.safetensors"),
        load_file(tmp_path / "run/model.safetensors"),
    )
    assert not torch.equal(first["blocks.2.feedforward.up.weight"], last["blocks.2.feedforward.up.weight"])


def test_a_kept_checkpoint_grows_with_its_run_s_tokenizer(growing, tmp_path):
    kept = {"every": 1, "keep_every": 1}
    stages = [{"tokens": 512}, {**grown("llama_pro", after=[0]), "tokens": 512}]
    train(growing(*stages, checkpoint=kept), tmp_path / "run")
    source = tmp_path / "run/checkpoints/step-00000002"
    assert main(["grow", str(source), str(tmp_path / "more"), "--operator", "append_last", "count=1"]) == 0
    assert (tmp_path / "more/tokenizer.json").read_bytes() == (tmp_path / "run/tokenizer.json").read_bytes()
    told = json.loads((tmp_path / "more/provenance.json").read_text())
    assert [row["id"] for row in told["layers"]] == [0, 3, 1, 2, 4]
    made = [{"operator": "llama_pro", "from": [0]}]
    assert told["layers"][1]["history"] == made
    assert told["from"]["provenance"]["layers"][1]["history"] == made


@pytest.mark.parametrize("operator", ["average", "lesa", "lesa_ridge", "aligned_lesa"])
def test_a_run_that_starts_from_weights_grows_before_its_first_step(growing, recipe, tmp_path, operator):
    shape = {**recipe().shape, "layers": EQUAL[:1] * 5}
    train(recipe(shape=shape, tokens=512), tmp_path / "small")
    stage = {**grown(operator, after=[1]), "tokens": 512}
    start = {"from": str(tmp_path / "small")}
    result = train(recipe(shape=None, tokens=None, stages=[stage], start=start), tmp_path / "run")
    assert [x["new"] for x in result["layers"]] == [False, False, True, False, False, False]


def test_what_an_operator_finds_out_within_a_run_is_told_and_kept(growing, recipe, tmp_path):
    """Layers of random numbers say nothing of one another, so there is something to warn of."""
    shape = {**recipe().shape, "layers": EQUAL[:1] * 5}
    stages = [{"tokens": 512}, {**grown("lesa", after=[1], epochs=1), "tokens": 512 * 2}]
    run = recipe(shape=shape, tokens=None, stages=stages, schedule=CONSTANT, checkpoint={"every": 1})
    events = []

    def stop(event):
        events.append(event)
        if event["event"] == "checkpoint" and event["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "run", reporter=stop)
    notes = [e["text"] for e in events if e["event"] == "note"]
    assert any(text.startswith("stage 1: ") and "neighbours" in text for text in notes), notes
    result = train(run, tmp_path / "run")
    assert set(result["transitions"]["1"]["matrices"]) >= {"query", "gate", "down"}


def test_a_layer_silenced_behind_a_reordered_norm_learns_at_a_sane_pace(growing, recipe, tmp_path):
    """Its norm's weight is 0, so what its first gradient touches is that alone; nothing is multiplied by 1/sqrt(eps)."""
    shape = {**recipe().shape, "layers": EQUAL, "norm_placement": "reordered", "qk_norm": "full"}
    stages = [{"tokens": 512 * 6}, {**grown("zero_average", after="uniform:2"), "tokens": 512 * 10}]
    run = recipe(shape=shape, tokens=None, stages=stages, schedule=CONSTANT)
    train(run, tmp_path / "run")
    found = records(tmp_path / "run")
    before = max(r["gradient_norm"] for r in found[2:6])
    assert all(r["gradient_norm"] < 5 * before for r in found[6:])
    assert found[-1]["loss"] < found[5]["loss"]
    weights = load_file(tmp_path / "run/model.safetensors")
    assert weights["blocks.1.attention_norm.weight"].abs().min() > 0


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ({"transition": {"grow": {"operator": "average"}}}, "stages[1].transition.grow: after is missing"),
        ({"transition": {"grow": {"after": [0]}}}, "stages[1].transition.grow: operator is missing"),
        ({"transition": {"grow": {"operator": "avarage", "after": [0]}}}, "did you mean average?"),
        (
            {"transition": {"grow": {"operator": "average", "after": "top:3"}}},
            "3 layers have 2 places between",
        ),
        ({"warmup_new": 2}, "stages[1].warmup_new: no layer is new"),
        (
            {
                "transition": {"grow": {"operator": "llama_pro", "after": "0"}},
                "warmup_new": 2,
                "trainable": "head",
            },
            "stages[1].warmup_new: nothing of the new layers learns",
        ),
    ],
)
def test_a_mistake_in_the_growth_is_refused_before_the_first_step(growing, tmp_path, stage, says):
    with pytest.raises(UserError) as caught:
        train(growing({"tokens": 512}, {"tokens": 512, **stage}), tmp_path / "run")
    assert says in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_from_another_start(growing, recipe, tmp_path):
    """What is new in the model that it started from is what `newest` means, so that it must be the same model."""
    train(growing({"tokens": 512}), tmp_path / "small")

    def grow(after):
        words = ["grow", tmp_path / "small", tmp_path / "start", "--operator", "llama_pro", "--after", after]
        shutil.rmtree(tmp_path / "start", ignore_errors=True)
        assert main([str(word) for word in words]) == 0

    def stop(event):
        if event["event"] == "checkpoint" and event["step"] == 2:
            raise KeyboardInterrupt

    def attempt(**options):
        stages = [{"tokens": 512}, {"tokens": 1024, "trainable": "newest"}]
        wanted = recipe(
            shape=None,
            tokens=None,
            stages=stages,
            start={"from": str(tmp_path / "start")},
            checkpoint={"every": 1},
        )
        return train(wanted, tmp_path / "run", **options)

    grow(0)
    with pytest.raises(KeyboardInterrupt):
        attempt(reporter=stop)
    grow(2)
    with pytest.raises(UserError, match=r"the model in .*start has changed since this run began"):
        attempt()
    grow(0)
    assert [row["id"] for row in attempt()["layers"] if row["new"]] == [3]


@pytest.mark.parametrize(
    "options", [{"operator": "average", "after": 3}, {"operator": "avrage"}, {"operator": ["average"]}]
)
def test_what_a_growth_gets_wrong_is_told_with_its_stage(growing, tmp_path, options):
    stages = [{"tokens": 512}, {"tokens": 512, "transition": {"grow": options}}]
    with pytest.raises(UserError, match=r"^recipe: stages\[1\].transition"):
        train(growing(*stages), tmp_path / "run")
