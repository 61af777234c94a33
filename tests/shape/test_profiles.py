"""Profiles and rounding against the published layer lists and their own definitions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entasis.errors import UserError
from entasis.shape import cost, profiles, specification
from entasis.shape.rounding import make_divisible, policy

HEADS = {
    "baseline-12": [12] * 12,
    "vanilla-12": [6, 9, 9, 12, 12, 15, 15, 18, 18, 21, 21, 24],
    "baseline-18": [9] * 18,
    "vanilla-18": [6, 6, *[9] * 10, *[12] * 6],
    "framed-18": [12, 6, *[9] * 10, *[12] * 6],
    "reverse-18": [*[12] * 6, *[9] * 10, 6, 12],
    "crown-18": [12, *[9] * 5, *[12] * 6, *[9] * 5, 12],
}
FFN = {
    "baseline-12": "3072 " * 12,
    "vanilla-12": "1536 1792 2048 2304 2560 2816 2816 3072 3328 3584 3840 4096",
    "baseline-18": "2048 " * 18,
    "vanilla-18": "768 1024 1024 1280 1280 1536 1536 1792 1792 2048 2048 2304 2304 2560 2560 2816 2816 3072",
    "framed-18": "3072 512 768 1024 1024 1280 1280 1536 1536 1792 2048 2048 2304 2560 2560 2816 2816 3072",
    "reverse-18": "3072 2816 2816 2560 2560 2304 2048 2048 1792 1536 1536 1280 1280 1024 1024 768 512 3072",
    "crown-18": "3072 768 1024 1280 1536 2048 2304 2560 2816 2816 2560 2304 2048 1536 1280 1024 768 3072",
}
MILLIONS = {
    "baseline-12": (181.1, 142.5),
    "vanilla-12": (178.8, 140.1),
    "baseline-18": (183.5, 144.8),
    "vanilla-18": (179.7, 141.1),
    "framed-18": (179.4, 140.7),
    "reverse-18": (179.4, 140.7),
    "crown-18": (181.9, 143.3),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_papers_models_come_out_as_published(name):
    shape = specification.preset(f"crown-paper/{name}")
    assert [x.n_heads for x in shape.layers] == HEADS[name]
    assert [x.n_kv_heads for x in shape.layers] == [h // 3 for h in HEADS[name]]
    assert [x.d_ff for x in shape.layers] == [int(x) for x in FFN[name].split()]
    millions = (
        round(cost.parameters(shape) / 1e6, 1),
        round(cost.parameters_without_input_embedding(shape) / 1e6, 1),
    )
    assert millions == MILLIONS[name]


def test_openelm_270m_comes_out_as_published():
    shape = specification.preset("openelm/270m")
    assert [x.n_heads for x in shape.layers] == [*[12] * 5, *[16] * 7, *[20] * 4]
    assert (shape.layers[0].d_ff, shape.layers[-1].d_ff) == (768, 5120)
    assert round(cost.parameters(shape) / 1e6, 1) == 271.5


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("smollm2/135m", 134_515_008), ("gpt2/small", 124_439_808)],
)
def test_uniform_presets_have_their_published_counts(name, parameters):
    assert cost.parameters(specification.preset(name)) == parameters


@pytest.mark.parametrize("name", ["450m", "1.1b", "3b"])
def test_larger_openelm_sizes_are_near_their_names(name):
    billions = {"450m": 0.457, "1.1b": 1.08, "3b": 3.04}[name]
    assert cost.parameters(specification.preset(f"openelm/{name}")) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_the_two_rules_differ_exactly_at_nine_tenths():
    # 0.9 · 1600 = 1440 = 1280 + 160: only the inclusive comparison moves up.
    value, divisor = 320.0, 288
    assert make_divisible(value, divisor, strict=True) == 288
    assert make_divisible(value, divisor, strict=False) == 288 + 288


@given(st.floats(1, 20_000), st.sampled_from([64, 192, 256]), st.booleans())
def test_make_divisible_stays_above_nine_tenths_and_on_the_grid(value, divisor, strict):
    result = make_divisible(value, divisor, strict=strict)
    assert result % divisor == 0
    assert result >= 0.9 * value


@given(st.floats(0.1, 64), st.sampled_from([16, 32, 64, 96, 128]), st.sampled_from([1, 2, 3, 4]))
def test_tensor_core_rounding_gives_whole_tiles(heads, head_dim, group):
    hopper = policy("tensor-core", head_dim=head_dim, group=group, ffn_multiple=None, device="hopper")
    assert hopper.heads(heads) * head_dim % 128 == 0
    assert hopper.heads(heads) % group == 0
    assert hopper.ffn(heads * 100) % 128 == 0


@pytest.mark.parametrize("part", ["ffn", "heads"])
@pytest.mark.parametrize("name", [n for n in profiles.PROFILES if n != "explicit"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 12, 18])
def test_every_profile_gives_one_multiplier_a_layer_and_its_controls_permute_it(name, n, part):
    values = profiles.multipliers(name, n, part, {})
    assert len(values) == n
    assert profiles.multipliers(f"{name}/reversed", n, part, {}) == values[::-1]
    shuffled = profiles.multipliers(f"{name}/shuffled:3", n, part, {})
    assert sorted(shuffled) == sorted(values)
    assert shuffled == profiles.multipliers(f"{name}/shuffled:3", n, part, {})


def test_shuffling_moves_ffn_and_heads_of_a_layer_together():
    n = 12
    ffn = profiles.multipliers("vanilla/shuffled:5", n, "ffn", {})
    heads = profiles.multipliers("vanilla/shuffled:5", n, "heads", {})
    assert [sorted(ffn).index(v) for v in ffn] == [sorted(heads).index(v) for v in heads]


def test_taper_follows_its_formula():
    import math

    n, start, end = 9, 1.5, 0.5
    expected = [end + (start - end) * (1 + math.cos(math.pi * i / (n - 1))) / 2 for i in range(n)]
    assert profiles.multipliers("taper", n, "ffn", {"start": start, "end": end}) == pytest.approx(expected)


def test_middle_leaves_the_ends_without_ffn():
    values = profiles.multipliers("middle", 10, "ffn", {})
    assert [v > 0 for v in values] == [False, *[True] * 7, False, False]


def test_points_pass_through_their_control_points():
    numbers = {"points": [[0, 1.0], [0.5, 3.0], [1, 2.0]]}
    values = profiles.multipliers("points", 5, "ffn", numbers)
    assert values == pytest.approx([1, 2, 3, 2.5, 2])
    smooth = profiles.multipliers("points", 5, "ffn", {**numbers, "curve": "cosine"})
    assert smooth[::2] == pytest.approx([1, 3, 2])


@pytest.mark.parametrize(
    ("name", "numbers", "says"),
    [
        ("crwon", {}, "did you mean crown"),
        ("crown", {"middle": 3}, "did you mean mid"),
        ("crown/sideways", {}, "/reversed"),
        ("explicit", {"values": [1, 2]}, "2 values for 4 layers"),
        ("points", {"points": [[0.5, 1], [0.2, 1]]}, "ascend"),
        ("vanilla", {"start": -1}, "negative"),
    ],
)
def test_a_wrong_profile_is_refused_with_what_would_be_right(name, numbers, says):
    with pytest.raises(UserError, match=says):
        profiles.multipliers(name, 4, "ffn", numbers)
