"""Activation checkpointing: the same numbers, less memory, the costliest first."""

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from entasis.errors import UserError
from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.quantities import size
from entasis.shape.activations import choose_checkpointed_layers, layer_bytes_per_token, peak_bytes_per_token
from entasis.shape.shapes import LayerShape, ModelShape
from entasis.train.compilation import compiled
from entasis.train.metrics import records
from entasis.train.run import train

B, T = 2, 64
SHAPE = ModelShape(
    d_model=64,
    head_dim=8,
    vocabulary=96,
    context=T,
    layers=(
        LayerShape(2, 2, 64),
        LayerShape(4, 2, 300),
        LayerShape(8, 8, 500),
        LayerShape(0, 0, 300),
        LayerShape(2, 1, 0),
    ),
)
HOW = {"precision": "fp32", "attention": "sdpa"}


def kept(model, precision: str, T: int = T) -> list[int]:
    """Bytes that each block keeps through `saved_tensors_hooks`, without weights (and copies of them) and rotations."""
    x_BTD = torch.randn(B, T, model.shape.d_model, requires_grad=True)
    rotation = model.rotation(0, T, x_BTD.device)
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *(rotation or ())]}
    result = []
    for block in model.blocks:
        weights = {tuple(p.shape) for p in block.parameters()}
        seen = {}

        def pack(t, seen=seen, weights=weights):
            storage = t.untyped_storage()
            is_weight = tuple(t.shape) in weights or tuple(t.T.shape) in weights if t.ndim == 2 else False
            if storage.data_ptr() not in known and not is_weight and t.dtype != torch.bool:
                seen[storage.data_ptr()] = (storage.nbytes(), t)  # held, so that no address is used twice
            return t

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            x_BTD = block(x_BTD, rotation)
        result.append(sum(nbytes for nbytes, _ in seen.values()))
    return result


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "plain"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": "head"},
        {"qk_norm": "full", "ffn": "gelu"},
        {"norm": "layernorm", "norm_bias": True, "ffn": "gelu_tanh", "ffn_bias": True, "qkv_bias": True},
    ],
)
def test_the_cost_model_says_what_autograd_keeps(precision, attention, changes):
    shape = dataclasses.replace(SHAPE, **changes)
    model = Transformer(shape, attention=attention)
    predicted = [
        B * T * layer_bytes_per_token(shape, i, T, precision=precision, attention=attention)
        for i in range(shape.n_layers)
    ]
    assert kept(model, precision) == predicted


def test_plain_attention_keeps_no_weights_of_keys_behind_a_block():
    predicted = [
        B * 320 * layer_bytes_per_token(SHAPE, i, 320, precision="bf16", attention="plain")
        for i in range(SHAPE.n_layers)
    ]
    found = kept(Transformer(SHAPE, attention="plain"), "bf16", 320)
    assert found == pytest.approx(predicted, rel=1e-3)  # bytes per token are rounded up


@pytest.mark.parametrize("changes", [{"norm_placement": "reordered"}, {"positions": "learned"}])
def test_for_other_drawings_it_is_an_upper_bound(changes):
    shape = dataclasses.replace(SHAPE, **changes)
    predicted = [B * T * layer_bytes_per_token(shape, i, T, precision="bf16") for i in range(shape.n_layers)]
    for found, most in zip(kept(Transformer(shape), "bf16"), predicted, strict=True):
        assert 0.75 * most < found <= most


def test_the_costliest_layers_are_chosen_and_no_more_than_needed():
    sizes = [layer_bytes_per_token(SHAPE, i, T, **HOW) for i in range(SHAPE.n_layers)]
    order = sorted(range(SHAPE.n_layers), key=lambda i: -sizes[i])
    assert choose_checkpointed_layers(SHAPE, sum(sizes) * 128, tokens=128, sequence=T, **HOW) == []
    least = peak_bytes_per_token(sizes, order, SHAPE.d_model)
    seen = set()
    for limit in range(least, sum(sizes), 50):
        chosen = choose_checkpointed_layers(SHAPE, limit * 128, tokens=128, sequence=T, **HOW)
        seen.add(tuple(chosen))
        assert peak_bytes_per_token(sizes, chosen, SHAPE.d_model) <= limit
        for i in chosen:
            assert peak_bytes_per_token(sizes, set(chosen) - {i}, SHAPE.d_model) > limit
    assert {(order[0],), tuple(sorted(order[:2]))} <= seen
    equal = dataclasses.replace(SHAPE, layers=(LayerShape(2, 1, 64),) * 4)
    one = layer_bytes_per_token(equal, 0, T, **HOW)
    assert choose_checkpointed_layers(equal, 4 * one - 1, tokens=1, sequence=T, **HOW) == [0]


def test_checkpointing_the_last_layer_alone_frees_nothing():
    """Its backward pass comes first, when all others still hold theirs."""
    assert peak_bytes_per_token([100, 100, 300], {2}, 1) == peak_bytes_per_token([100, 100, 300], set(), 1)
    assert peak_bytes_per_token([300, 100, 100], {0}, 1) == 300


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that are made and not yet freed, other than those of `known`."""

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.seen:
                storage = t.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return out

    def freed(self, which, nbytes):
        self.seen.discard(which)
        self.now -= nbytes


@pytest.mark.parametrize("chosen", [(), (7,), (3,), (3, 4), (2, 3, 4, 5), tuple(range(8))])
def test_the_predicted_peak_is_the_measured_one(chosen):
    """But for the gradients inside one layer, which come and go; and the last layer alone does free nothing."""
    widths = [(1, 64), (2, 128), (4, 300), (8, 600), (8, 600), (4, 300), (2, 128), (1, 64)]
    shape = dataclasses.replace(SHAPE, layers=tuple(LayerShape(2 * h, 2 * h, f) for h, f in widths))
    model = Transformer(shape)
    init_weights(model, 0)
    for i in chosen:
        model.blocks[i].activation_checkpointing = True
    sizes = [B * T * layer_bytes_per_token(shape, i, T, **HOW) for i in range(8)]
    predicted = peak_bytes_per_token(sizes, set(chosen), B * T * shape.d_model)
    x_BTD = torch.randn(B, T, shape.d_model)
    rotation = model.rotation(0, T, x_BTD.device)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    known = [x_BTD, *rotation, *model.parameters(), *(p.grad for p in model.parameters())]
    with Alive(known) as alive:
        y_BTD = x_BTD.requires_grad_()
        for block in model.blocks:
            y_BTD = block(y_BTD, rotation)
        y_BTD.backward(torch.ones_like(y_BTD))
    assert 0.98 * predicted < alive.peak < predicted + 0.45 * max(sizes)


@pytest.mark.parametrize("loss", ["eager", "compiled"])
def test_gradients_are_the_same_to_the_bit_and_less_is_kept(loss):
    plain, frugal = Transformer(SHAPE), Transformer(SHAPE)
    init_weights(plain, 0)
    init_weights(frugal, 0)
    sizes = [B * T * n for n in (layer_bytes_per_token(SHAPE, i, T, **HOW) for i in range(SHAPE.n_layers))]
    limit = sum(sizes) // 2
    chosen = choose_checkpointed_layers(SHAPE, limit, tokens=B * T, sequence=T, **HOW)
    assert 2 in chosen and len(chosen) < SHAPE.n_layers
    for i in chosen:
        frugal.blocks[i].activation_checkpointing = True
    tokens = torch.randint(96, (B, T), generator=torch.Generator().manual_seed(0))
    for model in (plain, frugal):
        loss_of = model.loss if loss == "eager" else compiled(model, backend="aot_eager")
        loss_of(tokens, tokens).backward()
    for (name, p), q in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    found = kept(frugal, "fp32")
    inputs = 4 * SHAPE.d_model * B * T
    assert found == [inputs if i in chosen else size for i, size in enumerate(sizes)]
    assert sum(found) <= limit


def test_a_recipe_s_limit_changes_no_loss_and_is_told(recipe, tmp_path):
    told = []
    train(recipe(activation_memory="2.5MB"), tmp_path / "frugal", reporter=told.append)
    train(recipe(), tmp_path / "plain")
    assert told[0]["checkpointed_layers"] == [0]
    a, b = ([row["loss"] for row in records(tmp_path / name)] for name in ("frugal", "plain"))
    assert a == b


def test_a_limit_that_cannot_be_kept_is_refused(recipe, tmp_path):
    with pytest.raises(
        UserError, match=r"with every layer under activation checkpointing; lower batch\.micro"
    ):
        train(recipe(activation_memory="1kB"), tmp_path)


@pytest.mark.parametrize(
    ("text", "bytes_"), [("8GiB", 8 << 30), ("500MB", 500_000_000), ("1.5K", 1500), (8_000, 8_000)]
)
def test_sizes(text, bytes_):
    assert size(text, "x") == bytes_


@pytest.mark.parametrize("text", ["8 gigs", "GiB", "0GiB", "-1"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="write a size such as 8GiB"):
        size(text, "activation_memory")
