"""Another way to write a layer is the same function; operators that match layers see no difference, others do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entasis.errors import UserError
from entasis.grow import alignment, importance, resize, symmetry
from entasis.grow.symmetry import Symmetry
from entasis.model.transformer import Transformer
from entasis.shape import layout
from entasis.shape.shapes import LayerShape, ModelShape
from tests.grow.test_operators import block, grow
from tests.grow.test_resize import TOKENS, random_model, resized
from tests.shape.test_cost import shapes

LAYERS = (LayerShape(4, 2, 10),) * 5
LLAMA = ModelShape(d_model=16, head_dim=4, vocabulary=10, layers=LAYERS, norm_scaling=True)
BIASED = ModelShape(
    d_model=16, head_dim=4, vocabulary=10, layers=LAYERS, norm="layernorm", norm_bias=True, qkv_bias=True,
    attention_output_bias=True, ffn_bias=True, qk_norm="full", norm_placement="reordered",
)  # fmt: skip
GELU = replace(BIASED, ffn="gelu", qk_norm="head", norm_placement="pre")


def any_symmetry(shape: ModelShape, layer: int, seed: int) -> Symmetry:
    rng, at = np.random.default_rng(seed), shape.layers[layer]
    groups = heads = units = signs = None
    if at.n_heads:
        groups = rng.permutation(at.n_kv_heads)
        heads = np.stack([rng.permutation(at.n_heads // at.n_kv_heads) for _ in groups])
    if at.d_ff:
        units = rng.permutation(at.d_ff)
        if symmetry.signs_are_free(shape, layer):
            signs = rng.choice([-1.0, 1.0], at.d_ff)
    return Symmetry(groups, heads, units, signs)


def rewritten(model: Transformer, seed: int) -> Transformer:
    """The model with every layer written down in another way, each drawn for itself."""
    shape = model.shape
    ways = {i: any_symmetry(shape, i, seed + i) for i in range(shape.n_layers)}
    read = symmetry.rewriting(reader(model), shape, ways)
    result = Transformer(shape).double()
    result.load_state_dict({name: read(name).clone() for name in layout.sizes(shape)}, assign=True)
    return result


def reader(model: Transformer):
    return {n: p.detach() for n, p in model.named_parameters()}.__getitem__


@settings(max_examples=60, deadline=None)
@given(shapes(), st.integers(0, 10**6))
def test_every_symmetry_leaves_the_logits_alone(shape, seed):
    model = random_model(shape)
    torch.testing.assert_close(rewritten(model, seed)(TOKENS), model(TOKENS), rtol=0, atol=1e-9)


def test_what_is_no_symmetry_is_refused_by_name():
    maps = symmetry.parameter_maps
    with pytest.raises(UserError, match="layer 1: signs of units are free only where the FFN has a gate"):
        maps(GELU, 1, Symmetry(signs=-np.ones(10)))
    with pytest.raises(UserError, match="layer 2: units are not an order of 0 to 9"):
        maps(LLAMA, 2, Symmetry(units=np.zeros(10, int)))
    with pytest.raises(UserError, match="layer 0: signs are not 10 of 1 and -1"):
        maps(LLAMA, 0, Symmetry(signs=np.full(10, 0.5)))
    with pytest.raises(UserError, match="layer 0: heads are not 2 groups of 2"):
        maps(LLAMA, 0, Symmetry(heads=np.zeros((1, 4), int)))
    with pytest.raises(UserError, match="layer 3: heads of a group are not an order of 0 to 1"):
        maps(LLAMA, 3, Symmetry(heads=np.array([[0, 1], [1, 1]])))
    with pytest.raises(UserError, match="align: layers 0 and 1 differ in shape"):
        odd = replace(LLAMA, layers=(LAYERS[0], LayerShape(4, 4, 10)))
        alignment.align(reader(random_model(odd)), odd, source=1, target=0)


@pytest.mark.parametrize("shape", [LLAMA, BIASED, GELU], ids=["llama", "biased", "gelu"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_alignment_finds_a_planted_symmetry(shape, seed):
    model = random_model(shape)
    model.blocks[3].load_state_dict(model.blocks[1].state_dict())
    read = symmetry.rewriting(reader(model), shape, {3: any_symmetry(shape, 3, seed)})
    found = alignment.align(read, shape, source=3, target=1)
    back = symmetry.rewriting(read, shape, {3: found.symmetry})
    for name, w in block(model, 1).items():
        torch.testing.assert_close(back(f"blocks.3.{name}"), w, rtol=0, atol=0)
    for part in (found.heads, found.units):
        assert part.cosine == pytest.approx(1, abs=1e-5) and part.control < 0.9
    assert (
        found.units.before < 0.9
    )  # of two groups of two heads an order drawn at random may leave all where they are
    turned = alignment.align(read, shape, source=3, target=1, control=True)
    assert (turned.heads, turned.units) == (found.heads, found.units)
    assert (turned.symmetry.units != found.symmetry.units).any()


COMMUTING = {
    "duplicate": {"after": [1, 3]},
    "llama_pro": {"after": [1, 3]},
    "half_step": {"after": [1, 3]},
    "stack": {},
    "aligned_average": {"after": [1, 3]},
    "aligned_lesa": {"after": [1, 3], "epochs": 2},
    "aligned_average-control": {"after": [1, 3], "control": True},
}


@pytest.mark.parametrize("shape", [LLAMA, BIASED, GELU], ids=["llama", "biased", "gelu"])
@pytest.mark.parametrize("name", COMMUTING)
def test_operators_do_not_see_how_layers_are_written(name, shape):
    model, operator = random_model(shape), name.split("-")[0]
    grown, _ = grow(model, operator, **COMMUTING[name])
    for seed in range(3):
        other, _ = grow(rewritten(model, seed), operator, **COMMUTING[name])
        torch.testing.assert_close(other(TOKENS), grown(TOKENS), rtol=0, atol=1e-9)


@pytest.mark.parametrize("target", [LayerShape(2, 1, 6), LayerShape(2, 2, 6), LayerShape(1, 1, 6)], ids=str)
def test_nor_does_cutting_by_importance(target):
    model = random_model(LLAMA)

    def cut(model):
        orders = {
            i: importance.order_by_norm(block(model, i), LLAMA, layer) for i, layer in enumerate(LLAMA.layers)
        }
        return resized(model, resize.plan(LLAMA, [target] * 5, orders=orders))

    torch.testing.assert_close(cut(rewritten(model, 0))(TOKENS), cut(model)(TOKENS), rtol=0, atol=1e-9)


def test_nor_does_an_export(tmp_path):
    from entasis.interop.exporting import export
    from entasis.interop.importing import import_model
    from entasis.model import weights

    plain = replace(LLAMA, norm_scaling=False)
    model = random_model(plain)
    logits = []
    for n, one in enumerate((model, rewritten(model, 0))):
        folder = tmp_path / str(n)
        folder.mkdir()
        weights.save(one.float(), folder)
        export(folder, tmp_path / f"{n}-hf", to="hf")
        import_model(tmp_path / f"{n}-hf", tmp_path / f"{n}-back")
        logits.append(weights.load(tmp_path / f"{n}-back")(TOKENS))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [("average", {}), ("interpolate", {"t": 0.3}), ("lesa", {"epochs": 2}), ("lesa_ridge", {})],
)
def test_mixing_layers_as_they_stand_depends_on_how_they_are_written(name, options):
    model = random_model(LLAMA)
    grown, _ = grow(model, name, after=[1, 3], **options)
    other, _ = grow(rewritten(model, 0), name, after=[1, 3], **options)
    assert (other(TOKENS) - grown(TOKENS)).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "depends"), [("zero_average", True), ("zero_aligned_average", False)])
def test_a_silent_mean_too_as_its_first_update_will_show(name, depends):
    """Its logits are the old model's either way; only after matching are its units the same ones in another order."""
    model = random_model(LLAMA)
    rows = []
    for one in (model, rewritten(model, 0)):
        grown, _ = grow(one, name, after=[1])
        rows.append(grown.blocks[2].feedforward.gate.weight.norm(dim=1).sort().values)
        assert not grown.blocks[2].feedforward.down.weight.any()
    assert bool((rows[0] - rows[1]).abs().max() > 1e-5) is depends
