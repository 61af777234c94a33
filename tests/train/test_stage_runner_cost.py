"""What a stage says that it costs is what its runner's model and optimizers take, parameters frozen or not."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from entasis.shape import cost
from entasis.shape.activations import layer_bytes_per_token
from entasis.train.auto_settings import simplest
from entasis.train.resolve import resolve
from entasis.train.stage_runner import StageRunner
from entasis.train.stages import lay_out

LAYERS = [
    {"n_heads": 2, "n_kv_heads": 1, "d_ff": 40},
    {"n_heads": 4, "n_kv_heads": 2, "d_ff": 56},
    {"n_heads": 2, "n_kv_heads": 2, "d_ff": 72},
]


@pytest.fixture
def runner(recipe):
    """`runner(selectors)`: that of a stage in which these learn."""

    def make(trainable):
        shape = {**recipe().shape, "layers": LAYERS}
        stages = [{"trainable": trainable, "tokens": 512}]
        resolved, built, _ = resolve(recipe(shape=shape, tokens=None, stages=stages, precision="fp32"), 0)
        settled = simplest(resolved, torch.device("cpu"))
        span = lay_out(settled, built)[0]
        return StageRunner(span, settled, torch.device("cpu"))

    return make


@pytest.mark.parametrize(
    ("trainable", "first"),
    [("all", 0), (["blocks[1:]", "final_norm", "head"], 1), (["blocks[2]", "norms"], 0), ("head", 3)],
)
def test_a_stage_costs_what_it_says(runner, trainable, first):
    stage = runner(trainable)
    span, model = stage.span, stage.model
    length, sequences = span.data.sequence, 2
    tokens_BT = torch.randint(span.shape.vocabulary, (sequences, length))
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    rotation_TK = model.rotation(0, length, tokens_BT.device)[0]
    at, kept = [-1], {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known and x.shape != rotation_TK.shape:
            kept.setdefault(at[0], {})[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: at.__setitem__(0, index))
        block.register_forward_hook(lambda *_: at.__setitem__(0, -1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model.loss(tokens_BT, tokens_BT)
    assert {index for index in kept if index >= 0} == set(range(first, len(LAYERS)))
    for index in range(first, len(LAYERS)):
        found = sum(size for size, _ in kept[index].values())
        said = sequences * length * layer_bytes_per_token(
            span.shape, index, length, precision="fp32", attention=stage.recipe.attention
        )  # fmt: skip
        learns = f"blocks.{index}.attention.query.weight" in span.trainable
        if learns and (index > first or "embedding.tokens.weight" in span.trainable):
            assert found == said
        else:  # frozen itself, or without a gradient at its input: it keeps less
            assert 0 < found <= said
    loss.backward()
    memory = cost.training_memory(span.shape, span.trainable)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert memory.gradients == sum(g.nbytes for g in gradients)
    assert span.counts.active == sum(g.numel() for g in gradients)
    stage.step(stage.gradient_norm())
    held = [x for o in stage.optimizers for state in o.state.values() for x in state.values() if x.ndim]
    assert memory.optimizer == sum(x.nbytes for x in held)
    with FlopCounterMode(display=False) as counter:
        model(tokens_BT).sum().backward()
    assert counter.get_total_flops() == sequences * length * span.flops_per_token
