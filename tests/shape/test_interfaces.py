"""Frozen interfaces: published counts, what tables tell apart, and what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entasis.cli import main
from entasis.errors import UserError
from entasis.model.initialisation import init_weights
from entasis.model.interfaces import EMBEDDINGS
from entasis.model.transformer import Transformer
from entasis.shape import LayerShape, ModelShape, layout
from entasis.shape.interfaces import INTERFACES
from entasis.shape.selectors import select


def shape(interface, **fields):
    fields = {"d_model": 48, "head_dim": 8, "vocabulary": 300, "norm": "layernorm", **fields}
    return ModelShape(layers=(LayerShape(2, 1, 24),), interface=interface, **fields)


def test_both_halves_know_the_same_kinds():
    assert set(INTERFACES) == set(EMBEDDINGS)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        # The published numbers: 180.506 (its table left out), 247.614, 181.554 and 269.699 million.
        ("9-layer-frozen-table", (180_505_600, 67_108_864, 247_614_464)),
        ("9-layer-trainable", (247_614_464, 0, 247_614_464)),
        ("9-layer-binary", (180_505_600, 1_048_576, 181_554_176)),
        ("16-layer-binary", (268_650_496, 1_048_576, 269_699_072)),
    ],
)
def test_the_published_counts(name, counts, capsys):
    assert main(["shape", f"constructive/{name}", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert tuple(answer["parameters_by_use"].values()) == counts
    if "binary" in name:
        # Codes of zeros only and of ones only both vanish in LayerNorm.
        told = answer["interface"]
        assert (told["rank"], told["distinct"]) == (16, 65_536)
        assert (told["distinct_after_norm"], told["vanishing"]) == (65_535, 2)


def test_the_published_stage(capsys):
    stage = ["--trainable", "blocks[6:]", "--trainable", "final_norm", "--trainable", "head"]
    assert main(["shape", "constructive/9-layer-binary", *stage]) == 0
    assert "104,952,832 active, 76,601,344 frozen, 181,554,176 stored" in " ".join(
        capsys.readouterr().out.split()
    )


@st.composite
def coded(draw):
    kind = draw(st.sampled_from(["binary", "affine_binary", "random_codes"]))
    interface = {"kind": kind, "bits": draw(st.sampled_from([10, 12, 24]))}
    interface |= {k: draw(st.sampled_from(v)) for k, v in ORDERS.items()}
    if kind == "binary":
        interface["stored"] = draw(st.booleans())
    vocabulary = draw(st.sampled_from([2, 300, 600]))
    width = interface["bits"] * draw(st.sampled_from([1, 2, 3]))
    odd = draw(st.integers(0, 5)) if interface["order"] == "tiled" else 0
    norm = draw(st.sampled_from(["rmsnorm", "layernorm"]))
    return shape(interface, d_model=width + odd, vocabulary=vocabulary, norm=norm)


ORDERS = {"order": ["tiled", "interleaved"], "values": ["balanced", "signs", "bits"]}


@settings(max_examples=15, deadline=None)
@given(coded())
def test_what_a_code_tells_apart_is_what_the_built_model_does(drawn):
    model = Transformer(drawn).double()
    init_weights(model, 0)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == layout.sizes(drawn)
    x_VD = model.embed(torch.arange(drawn.vocabulary)[None])[0]
    normed_VD = model.blocks[0].attention_norm(x_VD)
    told = drawn.interface.insight(drawn)
    assert told.rank == torch.linalg.matrix_rank(x_VD)
    assert told.distinct == len(torch.unique(x_VD, dim=0)) == drawn.vocabulary
    assert told.distinct_after_norm == len(torch.unique((normed_VD * 1e5).round() + 0.0, dim=0))
    assert told.vanishing == (normed_VD.abs().amax(1) < 1e-6).sum()
    if drawn.interface.values == "balanced" and drawn.d_model >= 2 * drawn.interface.bits:
        assert told.distinct_after_norm == drawn.vocabulary and told.vanishing == 0


def table(interface, **fields):
    model = Transformer(shape(interface, **fields))
    init_weights(model, 0)
    return model.embed(torch.arange(model.shape.vocabulary)[None])[0]


def test_channels_carry_the_bits_of_the_id():
    bits_VK = torch.tensor([[int(c) for c in f"{i:012b}"[::-1]] for i in range(300)]).float()
    plain = {"kind": "binary", "bits": 12, "values": "bits"}
    for stored in (False, True):
        own = {**plain, "stored": stored}
        assert torch.equal(table({**own, "order": "interleaved"}), bits_VK.repeat_interleave(4, dim=1))
        assert torch.equal(table({**own, "order": "tiled"}, d_model=50), bits_VK.repeat(1, 5)[:, :50])


def test_an_affine_code_is_an_invertible_recoding_of_the_bits():
    code = {"kind": "affine_binary", "bits": 12, "values": "bits", "seed": 5}
    own_VK = table({**code, "order": "tiled"}, d_model=12)
    bits_VK = table({"kind": "binary", "bits": 12, "values": "bits"}, d_model=12)
    offset_K = own_VK[0]
    columns_KK = torch.stack([(own_VK[2**j] + offset_K) % 2 for j in range(8)])
    assert torch.equal((bits_VK[:256, :8] @ columns_KK + offset_K) % 2, own_VK[:256])
    assert len(torch.unique(own_VK, dim=0)) == 300
    assert not torch.equal(own_VK, table({**code, "seed": 6}, d_model=12))


def test_a_random_table_is_the_one_a_learned_begins_with_and_may_have_a_seed_of_its_own():
    assert torch.equal(table({"kind": "random"}), table({"kind": "learned"}))
    assert not torch.equal(table({"kind": "random", "seed": 1}), table({"kind": "learned"}))
    assert table({"kind": "random", "std": 1.0}).std() == pytest.approx(1, abs=0.05)


def test_a_learned_interface_is_not_written():
    drawn = shape({"kind": "learned"})
    assert "interface" not in drawn.to_dict() and drawn == shape({"kind": "learned"})
    frozen = shape({"kind": "binary"})
    assert ModelShape.from_dict(json.loads(json.dumps(frozen.to_dict()))) == frozen


def test_random_codes_are_all_different_where_many_collide():
    drawn = shape({"kind": "random_codes", "bits": 26}, vocabulary=65_536)
    assert len({tuple(code) for code in drawn.interface.codes(drawn).tolist()}) == 65_536


@pytest.mark.parametrize("kind", ["random", "binary", "random_codes", "affine_binary", "glyph"])
def test_no_selector_reaches_a_frozen_table(kind):
    drawn = shape({"kind": kind}, d_model=64)
    assert set(select(drawn, "all")) == set(layout.learnable(drawn)) == set(select(drawn, "not embedding"))
    assert not any(name.startswith("embedding") for name in select(drawn, "all"))
    with pytest.raises(UserError, match=f"'embedding' means the frozen table of interface {kind}"):
        select(drawn, ["embedding", "head"], where="recipe: stages[0].trainable")
    positions = replace(drawn, positions="learned")
    assert select(positions, "embedding") == ["embedding.positions.weight"]


@pytest.mark.parametrize(
    ("interface", "fields", "message"),
    [
        ("binary", {}, "interface is 'binary'; write {kind: NAME}"),
        ({"kind": "binari"}, {}, "interface.kind is 'binari'; did you mean binary?"),
        ({"kind": "binary", "bit": 3}, {}, "interface: unknown key bit; did you mean bits?"),
        ({"kind": "learned", "bits": 3}, {}, "unknown key bits"),
        ({"kind": "binary", "bits": 8}, {}, "interface.bits is 8, too few for a vocabulary of 300; it takes 9"),
        ({"kind": "random_codes"}, {}, "interface.bits is 64, more than the 48 channels"),
        ({"kind": "binary", "order": "interleaved"}, {}, "9 bits do not divide d_model 48; use tiled"),
        ({"kind": "random", "std": 0}, {}, "std is 0; it must be a number above 0"),
        ({"kind": "glyph", "pixels": 6}, {}, "36 pixels, fewer than d_model 48"),
        ({"kind": "binary"}, {"tied_embeddings": True}, "interface binary is frozen and tied_embeddings would"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(interface, fields, message):
    with pytest.raises(UserError, match=r"^shape: ") as caught:
        shape(interface, **fields)
    assert message in str(caught.value)


def test_the_documented_table_is_the_registry():
    page = (Path(__file__).parents[2] / "docs" / "interfaces.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `")]
    assert [row[0].strip(" `") for row in rows] == list(INTERFACES)
    for name, says, _, options in rows:
        kind = INTERFACES[name.strip(" `")]
        first = kind.__doc__.splitlines()[0]
        assert says.strip().rstrip(".") in first
        assert re.findall(r"`(\w+)`", options) == list(kind.model_fields)
