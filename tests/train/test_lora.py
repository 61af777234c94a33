"""LoRA phases: adapters beside frozen matrices, merged where the model leaves the stage."""

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from entasis.errors import UserError
from entasis.evaluate.loading import load
from entasis.interop.exporting import export
from entasis.shape import cost, layout
from entasis.train.auto_settings import simplest
from entasis.train.metrics import records
from entasis.train.resolve import resolve
from entasis.train.run import train
from entasis.train.stage_runner import StageRunner, checkpointed_layers
from entasis.train.stages import lay_out

LORA = {"lora": {"rank": 3, "alpha": 6}, "trainable": ["final_norm", "head"]}


@pytest.fixture
def phases(recipe):
    """Two layers, then a LoRA phase, then a third stage: `phases(lora stage changes, last stage)`."""

    def make(lora=None, last=None, **changes):
        shape = {**recipe().shape, "ffn_bias": True, "attention_output_bias": True}
        stages = [{"tokens": 512 * 2}, {"tokens": 512 * 4, **LORA, **(lora or {})}]
        stages += [{"tokens": 512 * 2, **last}] if last else []
        return recipe(shape=shape, tokens=None, stages=stages, **changes)

    return make


def test_a_phase_trains_adapters_only_and_leaves_a_plain_model(phases, tmp_path):
    events = []
    result = train(phases(), tmp_path / "run", reporter=events.append)
    before = phases()
    train(before.replaced(stages=before.stages[:1]), tmp_path / "before")
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "run"))
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    adapted = {n for n in old if (".attention." in n or ".feedforward." in n) and n.endswith("weight")}
    assert changed == adapted | {"norm.weight", "head.weight"}
    for name in adapted:
        assert torch.linalg.matrix_rank((new[name] - old[name]).double(), rtol=1e-3) <= 3
    (moved,) = [e["moved"] for e in events if e["event"] == "merged"]
    assert 0 < moved <= 1e-5
    told = result["stages"][1]
    counted = sum(3 * sum(old[name].shape) for name in adapted)
    assert told["active_parameters"] == counted + old["norm.weight"].numel() + old["head.weight"].numel()
    assert told["stored_parameters"] == result["parameters"] + counted
    moments = load_file(tmp_path / "run" / "optimizer.safetensors")
    assert {key.split(":")[1] for key in moments} == {"norm.weight", "head.weight"}
    assert result["stages"][1]["bits_per_byte"] == result["validation"]["bits_per_byte"]
    assert load(tmp_path / "run").logits([1, 2, 3]).isfinite().all()


def test_a_rate_that_falls_for_matrices_falls_for_their_adapters(phases):
    resolved, shape, _ = resolve(phases({"anneal": [{"on": "blocks[0].attention"}]}), 257)
    span = lay_out(resolved, shape)[1]
    assert set(span.annealed) == {
        n for n in span.trainable if n.startswith("blocks.0.attention") and "lora" in n
    }
    assert len(span.annealed) == 2 * 4


@pytest.mark.parametrize("on", [["attention", "ffn"], ["query", "blocks[1].ffn"], ["blocks[1].down"]])
def test_counts_flops_and_memory_of_a_phase_are_those_of_the_built_one(phases, on):
    resolved, shape, _ = resolve(phases({"lora": {"rank": 3, "on": on}}), 0)
    recipe = simplest(resolved, torch.device("cpu"))
    recipe = recipe.replaced(batch=recipe.batch.replaced(micro=2))
    span = lay_out(recipe, shape)[1]
    runner = StageRunner(span, recipe, torch.device("cpu"))
    sizes = {n.replace(".base_layer.", "."): tuple(p.shape) for n, p in runner.model.named_parameters()}
    described = {p.name: p.size for p in layout.adapters(span.shape, span.ranks)}
    assert sizes == {**layout.sizes(span.shape), **described}
    learning = sum(p.numel() for p in runner.trainable)
    assert span.counts.active == learning
    memory = cost.training_memory(span.shape, span.trainable, ranks=span.ranks)
    tokens = torch.zeros(2, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        runner.model(tokens).sum().backward()
    assert counter.get_total_flops() == 2 * 64 * span.flops_per_token
    assert memory.gradients == sum(4 * p.grad.numel() for p in runner.trainable)
    runner.step(runner.gradient_norm())
    held = [x for o in runner.optimizers for s in o.state.values() for x in s.values() if x.ndim]
    assert memory.optimizer == sum(4 * x.numel() for x in held)


def test_activations_of_a_phase_count(phases):
    resolved, shape, _ = resolve(phases(activation_memory="1kB"), 0)
    recipe = simplest(resolved, torch.device("cpu"))
    recipe = recipe.replaced(batch=recipe.batch.replaced(micro=2))
    with pytest.raises(UserError, match="activation_memory"):
        checkpointed_layers(lay_out(recipe, shape)[1], recipe)


@pytest.mark.slow
def test_a_phase_then_growth_resumes_to_the_bit_from_every_checkpoint(phases, tmp_path):
    growth = {
        "transition": {"grow": {"operator": "append_random", "count": 1}},
        "trainable": ["newest", "head"],
        "optimizer_state": "keep",
    }
    settings = {"checkpoint": {"every": 1, "keep_last": 9}, "evaluation": {"every": 3, "tokens": 1000}}
    recipe = phases(last=growth, **settings)
    train(recipe, tmp_path / "whole")
    expected = [(r["loss"], r.get("validation_bits_per_byte")) for r in records(tmp_path / "whole")]
    for step in (2, 4, 6):  # at the end of a stage, inside the phase, at its end
        folder = tmp_path / f"stopped-{step}"

        def stop(event, step=step):
            if event["event"] == "checkpoint" and event["step"] == step:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(recipe, folder, reporter=stop)
        train(recipe, folder)
        assert [(r["loss"], r.get("validation_bits_per_byte")) for r in records(folder)] == expected
        assert (folder / "model.safetensors").read_bytes() == (
            tmp_path / "whole" / "model.safetensors"
        ).read_bytes()


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        (
            {"trainable": ["head", "biases"]},
            r"bias learns and has an adapter; adapters stand beside frozen matrices",
        ),
        ({"trainable": "all"}, "learns and has an adapter; adapters stand beside frozen matrices"),
        ({"lora": {"rank": 3, "on": "norms"}}, r"stands beside a matrix of a layer, and norms has none"),
        ({"lora": {"rank": 3, "on": ["attention", "head"]}}, "matrix of a layer, and head has none"),
        (
            {"lora": {"rank": 3, "on": ["not attention", "not ffn"]}},
            r"lora\.on: there is no matrix of a layer",
        ),
        ({"lora": {"rank": 3, "on": "atention"}}, "did you mean attention"),
        ({"lora": {"rank": 0}}, "rank is 0; it must be a whole number of at least 1"),
        ({"lora": {}}, "rank is missing"),
        ({"lora": {"rank": 3, "r": 3}}, "unknown key"),
        ({"cache_frozen": True}, "cache_frozen is true, but no layer is frozen below the first that learns"),
        ({"active_parameters": 8000}, "active_parameters is 8,000, but trainable is"),
    ],
)
def test_a_phase_that_cannot_be_is_refused_before_the_first_step(phases, tmp_path, lora, says):
    with pytest.raises(UserError, match=says):
        train(phases(lora), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_phase_leaves_is_exported(recipe, tmp_path):
    stages = [{"tokens": 512 * 2}, {"tokens": 512 * 2, **LORA}]
    train(recipe(tokens=None, stages=stages), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "hf", to="hf")
    ours, theirs = (load(tmp_path / name).logits([1, 2, 3]) for name in ("run", "hf"))
    assert torch.allclose(ours, theirs, atol=1e-6)
