"""What each selector means, against names picked by hand."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entasis.errors import UserError
from entasis.shape import LayerShape, ModelShape, layout
from entasis.shape.selectors import WORDS, select
from tests.shape.test_cost import shapes

SHAPE = ModelShape(
    d_model=16,
    head_dim=4,
    vocabulary=20,
    layers=(LayerShape(2, 1, 8), LayerShape(4, 2, 0), LayerShape(0, 0, 8), LayerShape(2, 2, 8)),
    qkv_bias=True,
    qk_norm="head",
)


def names(*terms, shape=SHAPE, newest=()):
    return select(shape, list(terms), newest=newest)


def test_words_mean_what_the_table_says():
    everything = list(layout.sizes(SHAPE))
    assert names("all") == everything
    assert names("attention") == [n for n in everything if ".attention." in n]
    assert names("ffn") == [n for n in everything if ".feedforward." in n]
    assert names("norms") == [n for n in everything if ".attention_norm." in n or ".feedforward_norm." in n]
    assert names("embedding") == ["embedding.tokens.weight"]
    assert names("head") == ["head.weight"]
    assert names("final_norm") == ["norm.weight"]
    assert names("biases") == [n for n in everything if n.endswith(".bias")]
    assert names("query") == [n for n in everything if ".query." in n]


def test_positions_are_the_models_own():
    assert {n.split(".")[1] for n in names("blocks[1:]")} == {"1", "2", "3"}
    assert {n.split(".")[1] for n in names("blocks[0,-1]")} == {"0", "3"}
    assert {n.split(".")[1] for n in names("blocks[::2]")} == {"0", "2"}
    assert names("blocks[3].attention.biases") == [
        f"blocks.3.attention.{part}.bias" for part in ("query", "key", "value")
    ]
    assert {n.split(".")[1] for n in names("newest", newest={2})} == {"2"}


def test_a_list_is_a_union_and_not_takes_away_afterwards():
    assert names("head", "final_norm") == ["norm.weight", "head.weight"]
    assert names("not embedding") == list(layout.sizes(SHAPE))[1:]
    assert names("not biases", "attention") == [n for n in names("attention") if not n.endswith("bias")]
    assert names("blocks.3.*", "not blocks[3].ffn") == [
        n for n in names("blocks[3]") if ".feedforward." not in n
    ]


def test_a_tied_head_is_the_embedding():
    assert names("head", shape=replace(SHAPE, tied_embeddings=True)) == ["embedding.tokens.weight"]


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (["newest"], "no layer was added"),
        (["blocks[4]"], "no layer 4; the model's are 0 to 3"),
        (["blocks[x]"], "write a slice"),
        (["blocks[9:]"], "no parameter matches 'blocks\\[9:\\]'"),
        (["blocks[2].attention"], "no parameter matches"),
        (["atention"], "did you mean attention"),
        (["not atention"], "did you mean attention"),
        (["head", "not head"], "leaves nothing"),
        ([], "empty list"),
    ],
)
def test_what_means_nothing_is_refused_by_name(terms, message):
    with pytest.raises(UserError, match=message):
        select(SHAPE, terms, where="recipe: stages[0].trainable")


@settings(max_examples=50, deadline=None)
@given(shapes(), st.sampled_from(sorted(WORDS)))
def test_a_word_and_its_not_share_out_the_model(shape, word):
    try:
        meant = set(select(shape, word))
    except UserError:
        return
    rest = set(select(shape, f"not {word}")) if meant != set(layout.sizes(shape)) else set()
    assert meant | rest == set(layout.sizes(shape)) and not meant & rest
