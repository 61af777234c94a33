"""No layer may run eagerly when the recipe says compile, however many shapes there are."""

import dataclasses
import functools

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters

from entasis.data.corpus import Corpus
from entasis.model.block import Block
from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.shape.shapes import LayerShape, ModelShape
from entasis.train import parallel, sharding, stage_runner
from entasis.train.auto_settings import simplest
from entasis.train.compilation import compile_parts, compiled, eager
from entasis.train.metrics import records
from entasis.train.recipe import Parallel
from entasis.train.resolve import resolve
from entasis.train.run import train
from entasis.train.stage_runner import StageRunner
from entasis.train.stages import lay_out


def many_shapes(layers: int) -> ModelShape:
    return ModelShape(
        d_model=32,
        head_dim=8,
        vocabulary=64,
        context=32,
        layers=tuple(LayerShape(n_heads=1 + i % 4, n_kv_heads=1, d_ff=16 + 8 * i) for i in range(layers)),
    )


def test_twelve_distinct_layers_are_one_graph_without_breaks():
    shape = many_shapes(12)
    assert shape.distinct_layers == 12
    model = Transformer(shape)
    seen = []

    def backend(graph, _inputs):
        seen.append(graph)
        return graph.forward

    counters.clear()
    loss_of = compiled(model, backend=backend)
    tokens = torch.randint(64, (2, 32))
    loss_of(tokens, tokens).backward()
    loss_of(tokens, tokens)
    assert len(seen) == 1
    assert sum(counters["graph_break"].values()) == 0
    # Every FFN of every layer is in the graph: none was left to run outside of it.
    values = [node.meta.get("example_value") for node in seen[0].graph.nodes]
    widths = {value.shape[-1] for value in values if isinstance(value, torch.Tensor) and value.ndim}
    assert {layer.d_ff for layer in shape.layers} <= widths


def test_a_sharded_model_has_one_graph_for_each_shape(tmp_path):
    """Gathering happens between the blocks, so each block is compiled; equal blocks share their graph."""
    shape = many_shapes(12)
    shape = dataclasses.replace(shape, layers=shape.layers + shape.layers)
    assert (shape.n_layers, shape.distinct_layers) == (24, 12)
    tokens = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(0))
    plain, sharded = Transformer(shape), Transformer(shape)
    init_weights(plain, 0)
    init_weights(sharded, 0)
    expected = plain.loss(tokens, tokens)
    expected.backward()
    seen = []

    def backend(graph, _inputs):
        seen.append(graph)
        return graph.forward

    counters.clear()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        for block in sharded.blocks:
            block.activation_checkpointing = block.index % 12 < 4
        sharding.shard(sharded, Parallel(kind="fsdp"), torch.device("cpu"), "fp32")
        loss_of = compiled(sharded, backend=backend)
        for _ in range(2):
            sharded.zero_grad()
            loss = loss_of(tokens, tokens)
            loss.backward()
        gradients = {name: sharding.full(p.grad) for name, p in sharded.named_parameters()}
        with torch.no_grad(), eager():
            sharded.loss(tokens[:1], tokens[:1])
    finally:
        dist.destroy_process_group()
    assert len(seen) == shape.distinct_layers + 1, "one for each shape and one for the head, none to validate"
    assert sum(counters["graph_break"].values()) == 0
    assert torch.equal(loss, expected)
    assert all(torch.equal(gradients[name], p.grad) for name, p in plain.named_parameters())


def test_several_processes_compile_equal_layers_once_and_compile_nothing_to_validate(
    monkeypatch, recipe, tmp_path
):
    """Under `ddp`, through a stage runner: three layers of one shape and one of another."""
    plain, other = {"n_heads": 2, "n_kv_heads": 1, "d_ff": 40}, {"n_heads": 2, "n_kv_heads": 1, "d_ff": 48}
    shape = {**recipe().shape, "layers": [plain, plain, other, plain]}
    wanted = simplest(resolve(recipe(shape=shape, precision="fp32"), 0)[0], torch.device("cpu"))
    span = lay_out(wanted, ModelShape.from_dict(wanted.shape))[0]
    seen = []

    def backend(graph, _inputs):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(stage_runner, "compiled", functools.partial(compiled, backend=backend))
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    counters.clear()
    try:
        losses = []
        for compile in (False, True):
            runner = StageRunner(span, wanted.replaced(compile=compile), torch.device("cpu"))
            tokens = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(0))
            for _ in range(2):
                losses.append(runner.accumulate(tokens, tokens, None, tokens=64, last=True))
                runner.step(runner.gradient_norm())
            runner.evaluate(Corpus(recipe().data.validation), sequence=16)
            runner.close()
    finally:
        dist.destroy_process_group()
    assert len(seen) == 2 + 1, "one for each shape and one for the head; none to validate"
    assert sum(counters["graph_break"].values()) == 0
    assert losses[:2] == losses[2:]


@pytest.mark.parametrize("how", ["whole", "parts", "sharded"])
def test_a_layer_that_cannot_be_compiled_is_an_error(how, monkeypatch, tmp_path):
    """Nothing falls back to eager, whatever is compiled and whatever hooks there are."""
    model = Transformer(many_shapes(2))
    init_weights(model, 0)
    tokens = torch.randint(64, (1, 16))
    forward = Block._layer

    def broken(self, *args):
        torch._dynamo.graph_break()
        return forward(self, *args)

    monkeypatch.setattr(Block, "_layer", broken)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        if how == "sharded":
            sharding.shard(model, Parallel(kind="fsdp"), torch.device("cpu"), "fp32")
        if how == "parts":
            compile_parts(model, backend="eager")
        loss_of = model.loss if how == "parts" else compiled(model, backend="eager")
        with pytest.raises(Unsupported):
            loss_of(tokens, tokens)
    finally:
        dist.destroy_process_group()


def test_equal_layers_are_compiled_once_though_layernorm_scaling_gives_each_a_number_of_its_own():
    shape = dataclasses.replace(many_shapes(1), norm_scaling=True)
    model = Transformer(dataclasses.replace(shape, layers=shape.layers * 12))
    init_weights(model, 0)
    tokens = torch.randint(64, (1, 16))
    model.loss(tokens, tokens).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    seen = []

    def backend(graph, _inputs):
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compile_parts(model, backend=backend)
    model.loss(tokens, tokens).backward()
    assert len(seen) == 2, "one for the layers and one for the head"
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())


def test_more_models_than_dynamo_s_limit_in_one_process():
    tokens = torch.randint(64, (1, 16))
    for width in range(16, 96, 8):
        shape = many_shapes(1)
        model = Transformer(dataclasses.replace(shape, layers=(LayerShape(1, 1, width),)))
        init_weights(model, 0)
        expected = model.loss(tokens, tokens)
        torch.testing.assert_close(compiled(model, backend="eager")(tokens, tokens), expected)


@pytest.mark.slow
def test_compiled_training_follows_the_eager_curve(recipe, tmp_path):
    shape = {**recipe().shape, "layers": recipe().shape["layers"][:1]}
    train(recipe(shape=shape), tmp_path / "eager")
    train(recipe(shape=shape, compile=True), tmp_path / "compiled")
    a, b = ([row["loss"] for row in records(tmp_path / name)] for name in ("eager", "compiled"))
    assert a == pytest.approx(b, rel=1e-4)
