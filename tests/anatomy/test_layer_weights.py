"""Layers of unequal shape: what a neighbour's weights become."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from small_models import SHAPE, untrained
from torch.func import functional_call

from entasis.anatomy.diagnostics.ablation import drop_half
from entasis.anatomy.layer_weights import average_neighbours, copy_with_weights, fit_weights, read_weights
from entasis.model.transformer import Transformer
from entasis.shape.shapes import LayerShape


def model_of(*layers: LayerShape, **fields: object) -> Transformer:
    model = untrained(replace(SHAPE, layers=layers, **fields)).model
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return model


def run(model: Transformer, layer: int, weights=None) -> torch.Tensor:
    x_BTD = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2))
    return functional_call(model.blocks[layer], weights or {}, (x_BTD, model.rotation(0, 7, x_BTD.device)))


@pytest.mark.parametrize("fields", [
    {}, {"ffn": "gelu", "ffn_bias": True, "qkv_bias": True, "attention_output_bias": True}, {"qk_norm": "head"},
])  # fmt: skip
def test_a_narrow_layer_in_a_wide_one_computes_the_same(fields: dict) -> None:
    model = model_of(LayerShape(4, 2, 48), LayerShape(6, 3, 80), **fields)
    wide = fit_weights(model, 0, 1)
    torch.testing.assert_close(run(model, 1, wide), run(model, 0), rtol=1e-4, atol=1e-5)


def test_a_wide_layer_in_a_narrow_one_keeps_what_matters() -> None:
    model = model_of(LayerShape(6, 3, 80), LayerShape(4, 2, 48))
    with torch.no_grad():  # KV group 1 and the first 32 hidden units do nothing
        model.blocks[0].attention.output.weight[:, 32:64] = 0
        model.blocks[0].feedforward.down.weight[:, :32] = 0
    narrow = fit_weights(model, 0, 1)
    torch.testing.assert_close(run(model, 1, narrow), run(model, 0), rtol=1e-4, atol=1e-5)


def test_a_missing_half_counts_as_zero() -> None:
    model = model_of(LayerShape(4, 2, 0), LayerShape(4, 2, 48), LayerShape(4, 2, 48))
    found = average_neighbours(model, 1)
    above = read_weights(model, 2)
    torch.testing.assert_close(found["feedforward.up.weight"], above["feedforward.up.weight"] / 2)
    assert set(found) == set(read_weights(model, 1))
    assert run(model, 1, found).isfinite().all()


def test_groups_of_another_size_have_no_average() -> None:
    model = model_of(*(LayerShape(4, 2, 48),) * 2, *(LayerShape(4, 4, 48),) * 2)
    assert [average_neighbours(model, i) is None for i in range(4)] == [False, True, True, False]
    assert average_neighbours(model_of(LayerShape(4, 2, 48)), 0) is None


def test_the_average_of_equal_neighbours_is_theirs() -> None:
    model = model_of(*(LayerShape(4, 2, 48),) * 3)
    model.blocks[2].load_state_dict(model.blocks[0].state_dict())
    torch.testing.assert_close(run(model, 1, average_neighbours(model, 1)), run(model, 0))


def test_nothing_changes_the_model_itself() -> None:
    model = model_of(LayerShape(4, 2, 48), LayerShape(4, 2, 48))
    before, clean = {n: p.clone() for n, p in model.named_parameters()}, run(model, 0)
    half = drop_half(model.blocks[0], "attention")
    x_BTD = torch.randn(2, 7, 32)
    assert not torch.equal(half(x_BTD, None), model.blocks[0](x_BTD, model.rotation(0, 7, x_BTD.device)))
    zeros = {n: torch.zeros_like(w) for n, w in read_weights(model, 0).items()}
    changed = copy_with_weights(model, {0: zeros})
    assert not torch.equal(run(changed, 0), clean) and changed.blocks[1] is model.blocks[1]
    assert torch.equal(run(model, 0), clean)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
