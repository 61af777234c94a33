"""Growing on a frozen interface: fresh layers on a frozen stack, within a budget of what may learn."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from entasis.data.prepare import prepare
from entasis.errors import DiskFull, UserError
from entasis.shape import cost
from entasis.shape.shapes import ModelShape
from entasis.train import frozen_outputs
from entasis.train.auto_settings import simplest
from entasis.train.frozen_outputs import FrozenOutputs
from entasis.train.metrics import records
from entasis.train.resolve import resolve
from entasis.train.run import train
from entasis.train.stage_runner import StageRunner
from entasis.train.stages import lay_out

LAYER = {"n_heads": 2, "n_kv_heads": 1, "d_ff": 48}
GROW = {
    "transition": {"grow": {"operator": "append_random", "count": 1}},
    "trainable": ["newest", "final_norm", "head"],
}
LAYER_COUNT, HEAD_COUNT = 6_208, 8_256


@pytest.fixture
def grown(recipe):
    """A recipe of one layer, then two more one at a time: `grown({key of stages 2 and 3}, …)`."""

    def make(later=None, *, tokens=512 * 2, **changes):
        shape = {**recipe().shape, "layers": [LAYER], "interface": {"kind": "binary"}}
        stages = [{"tokens": tokens}] + [{"tokens": tokens, **GROW, **(later or {})}] * 2
        return recipe(shape=shape, tokens=None, stages=stages, **changes)

    return make


def losses(folder):
    return [row["loss"] for row in records(folder)]


def test_only_the_newest_layer_and_what_is_above_learn(grown, tmp_path):
    events = []
    recipe = grown({"active_parameters": LAYER_COUNT + HEAD_COUNT})
    result = train(recipe, tmp_path / "run", reporter=events.append)
    told = [e for e in events if e["event"] == "stage"]
    assert [e["active_parameters"] for e in told] == [LAYER_COUNT + HEAD_COUNT] * 3
    assert [e["frozen_parameters"] for e in told] == [0, LAYER_COUNT, 2 * LAYER_COUNT]
    assert [s["tokens"] for s in result["stages"]] == [1024] * 3
    # The time left knows what the stages to come cost.
    price = [e["flops_per_token"] for e in told for _ in range(2)]
    left = [e["eta_seconds"] / e["seconds"] for e in events if e["event"] == "step"]
    assert left == pytest.approx([sum(price[i + 1 :]) / price[i] for i in range(6)])
    scores = [s["bits_per_byte"] for s in result["stages"]]
    assert all(scores) and scores[-1] == result["validation"]["bits_per_byte"]
    # What AdamW remembers are two numbers of each parameter that learns, and its step.
    moments = load_file(tmp_path / "run" / "optimizer.safetensors")
    kept = [x.numel() for key, x in moments.items() if not key.startswith("step:")]
    assert sum(kept) == 2 * (LAYER_COUNT + HEAD_COUNT)
    shape = ModelShape.from_dict({**recipe.shape, "layers": [LAYER] * 3})
    assert cost.training_memory(shape, {k.split(":")[1] for k in moments}).optimizer == 4 * sum(kept)


def test_a_stage_beyond_its_budget_is_refused_before_the_first_step(grown, tmp_path):
    with pytest.raises(UserError, match=r"stages\[1\]: active_parameters is 9,000, but trainable is 14,464"):
        train(grown({"active_parameters": 9000}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_frozen_stack_leaves_nothing_for_the_backward_pass_and_computes_in_the_recipe_s_precision(
    grown, precision
):
    resolved, shape, _ = resolve(grown(precision=precision), 0)
    recipe = simplest(resolved, torch.device("cpu"))
    span = lay_out(recipe, shape)[2]
    runner = StageRunner(span, recipe, torch.device("cpu"))
    assert span.first_trained == 2
    seen, kept, dtypes = {}, [], []

    def saving(index, block):
        def before(*_):
            seen["at"] = index

        def after(module, args, x_BTD):
            dtypes.append((module.feedforward.up(args[0]).dtype, x_BTD.requires_grad))

        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)

    for index, block in enumerate(runner.model.blocks):
        saving(index, block)
    tokens = torch.zeros(2, 64, dtype=torch.long)
    pack = lambda x: kept.append(seen.get("at")) or x  # noqa: E731
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        runner.model.loss(tokens, tokens).backward()
    assert {index for index in kept if index is not None} == {2}
    computed = torch.bfloat16 if precision == "bf16" else torch.float32
    assert dtypes == [(computed, False), (computed, False), (computed, True)]


@pytest.fixture
def little(tmp_path):
    """A corpus of few windows, which a stage reads several times."""
    (tmp_path / "text").mkdir()
    for i in range(4):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} bottles of beer on the wall\n" * 24)
    prepare([tmp_path / "text"], tmp_path / "little", tokenizer="bytes", validation=0)
    return tmp_path / "little" / "train"


@pytest.mark.parametrize(("precision", "masking"), [("fp32", True), ("bf16", False)])
def test_frozen_outputs_read_from_disk_change_no_bit(
    grown, little, tmp_path, monkeypatch, masking, precision
):
    changes = {
        "tokens": 128 * 40,
        "batch": {"tokens": 128},
        "precision": precision,
        "data": {"train": str(little), "validation": None, "document_masking": masking, "sequence": 32},
        "checkpoint": {"every": None},
    }
    train(grown(**changes), tmp_path / "plain")
    found, get = [], FrozenOutputs.get

    def counted(self, windows, device):
        x_BTD = get(self, windows, device)
        found.append(x_BTD is not None)
        return x_BTD

    monkeypatch.setattr(FrozenOutputs, "get", counted)
    train(grown({"cache_frozen": True}, **changes), tmp_path / "cached")
    assert losses(tmp_path / "cached") == losses(tmp_path / "plain")
    assert len(found) == 80 and sum(found) >= 15

    def stop(event):
        if event["event"] == "step" and event["step"] == 50:
            assert list((tmp_path / "stopped").glob("*.scratch"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(grown({"cache_frozen": True}, **changes), tmp_path / "stopped", reporter=stop)
    for name in ("cached", "stopped"):
        assert not list((tmp_path / name).glob("*.scratch"))


def test_a_cache_takes_room_for_what_a_stage_reads_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_outputs.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_000))
    size = {"sequence": 8, "width": 16}
    FrozenOutputs(tmp_path, windows=10**6, read=19, **size).close()
    with pytest.raises(DiskFull, match=r"free some and give the same command"):
        FrozenOutputs(tmp_path, windows=10**6, read=20, **size)


def test_a_cache_of_nothing_and_a_compiled_one_are_refused(grown, tmp_path):
    with pytest.raises(UserError, match=r"stages\[1\]: cache_frozen is true, but no layer is frozen below"):
        train(grown({"cache_frozen": True, "trainable": "all"}), tmp_path / "run")
    with pytest.raises(UserError, match="compile is true and a stage has cache_frozen"):
        train(grown({"cache_frozen": True}, compile=True), tmp_path / "run")
