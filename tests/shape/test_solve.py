"""The solver hits budgets, keeps silhouettes, and says what it missed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entasis.errors import UserError
from entasis.shape import cost, profiles, solve, specification
from entasis.shape.specification import resolve

SMALL = {"layers": 8, "d_model": 128, "head_dim": 16, "vocabulary": 4096, "tied_embeddings": True}
PROFILES = [
    "vanilla",
    "framed",
    "reverse",
    "crown",
    "taper",
    "middle",
    "crown/shuffled:1",
    "vanilla/reversed",
]


@pytest.mark.parametrize("kind", ["parameters", "parameters_without_input_embedding", "flops_per_token"])
@pytest.mark.parametrize("profile", PROFILES)
def test_small_shapes_meet_a_budget_within_a_thousandth(profile, kind):
    value = {"flops_per_token": 24_000_000}.get(kind, 2_000_000)
    solution = resolve({**SMALL, "profile": profile, "budget": {kind: value}})
    assert abs(solution.miss) < 1e-3
    assert solution.achieved == solve.MEASURES[kind](solution.shape, 1024, "full")


@pytest.mark.parametrize("profile", ["isotropic", "crown", "vanilla"])
def test_a_kv_budget_is_met_by_the_heads(profile):
    source = {
        "profile": profile,
        "layers": 16,
        "d_model": 1024,
        "head_dim": 32,
        "budget": {"kv_bytes_per_token": 60_000},
    }
    solution = resolve(source)
    # One head in one layer is 128 bytes; equal layers move together.
    assert abs(solution.achieved - 60_000) <= 128 * (16 if profile == "isotropic" else 2) / 2


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(PROFILES),
    st.integers(2, 20),
    st.integers(2, 12),
    st.integers(1_000_000, 50_000_000),
    st.sampled_from(["exact", "tensor-core"]),
)
def test_the_order_of_layers_is_the_profiles(profile, n, width, value, rounding):
    source = {"profile": profile, "layers": n, "d_model": 64 * width, "vocabulary": 512, "rounding": rounding}
    try:
        solution = resolve({**source, "budget": value})
    except UserError as error:
        assert "too small" in str(error)
        return
    free = resolve(source).shape
    for a, b in zip(solution.shape.layers, solution.shape.layers[1:], strict=False):
        i = solution.shape.layers.index(a)
        j = solution.shape.layers.index(b)
        if a.d_ff > b.d_ff:
            assert free.layers[i].d_ff >= free.layers[j].d_ff
    assert [x.n_heads for x in solution.shape.layers] == [x.n_heads for x in free.layers]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([*PROFILES, "isotropic"]),
    st.sampled_from(["exact", "tensor-core", "crown-paper", "corenet"]),
    st.sampled_from(["ffn", "heads", "both"]),
    st.integers(200_000, 20_000_000),
)
def test_only_a_profiles_own_zero_leaves_a_part_out(profile, rounding, scale, value):
    source = {**SMALL, "profile": profile, "rounding": rounding}
    try:
        solved = resolve({**source, "scale": scale, "budget": value}).shape.layers
    except UserError as error:
        assert "too small" in str(error)
        return
    free = resolve(source).shape.layers
    assert [(x.n_heads > 0, x.d_ff > 0) for x in solved] == [(x.n_heads > 0, x.d_ff > 0) for x in free]


@pytest.mark.parametrize("rounding", ["crown-paper", "corenet"])
def test_both_parts_meet_a_budget_under_the_rounding_of_papers(rounding):
    source = {"profile": "vanilla", "layers": 12, "d_model": 768, "vocabulary": 4096, "rounding": rounding}
    free = resolve(source).shape
    solution = resolve({**source, "scale": "both", "budget": 3 * cost.parameters(free)})
    assert abs(solution.miss) < 0.05
    for a, b in zip(free.layers, solution.shape.layers, strict=True):
        assert (a.n_heads < b.n_heads) and (a.d_ff < b.d_ff)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["isotropic", "crown", "middle"]),
    st.sampled_from(["crown", "vanilla", "framed"]),
    st.integers(2, 14),
    st.sampled_from(["exact", "tensor-core", "crown-paper"]),
    st.floats(0.5, 3),
)
def test_layers_of_one_ffn_multiplier_keep_one_width_whatever_their_heads(ffn, heads, n, rounding, factor):
    source = {**SMALL, "profile": {"ffn": ffn, "heads": heads}, "layers": n, "rounding": rounding}
    budget = round(factor * cost.parameters(resolve(source).shape))
    try:
        solution = resolve({**source, "budget": budget})
    except UserError as error:
        assert "too small" in str(error)
        return
    multipliers = profiles.multipliers(ffn, n, "ffn", {})
    pairs = set(zip(multipliers, [x.d_ff for x in solution.shape.layers], strict=True))
    assert len(pairs) == len(set(multipliers))


def test_no_ffn_is_moved_away_from_its_equals_to_meet_a_budget():
    crown = {**SMALL, "profile": {"ffn": "crown", "heads": "vanilla"}}
    widths = [x.d_ff for x in resolve({**crown, "budget": 1_538_885}).shape.layers]
    assert widths == widths[::-1]
    equal = {**SMALL, "profile": {"ffn": "isotropic", "heads": "vanilla"}, "rounding": "tensor-core"}
    solution = resolve({**equal, "budget": 1_700_000})
    assert len({x.d_ff for x in solution.shape.layers}) == 1
    assert "FFN steps of 64 in all layers at once" in solution.notes[-1]


def test_a_coarse_rounding_says_what_it_missed_and_why():
    solution = resolve(
        {"profile": "isotropic", "layers": 18, "d_model": 768, "rounding": "crown-paper", "budget": "180M"}
    )
    assert abs(solution.miss) > 1e-3
    assert solution.shape.uniform
    assert "steps of 256 in all layers at once" in " ".join(solution.notes)


def test_a_moved_layer_is_named():
    solution = resolve({**SMALL, "profile": "framed", "head_dim": 32, "budget": 2_000_000})
    assert solution.miss == 0
    assert "layer 1: FFN 127 → 128" in solution.notes[0]


@pytest.mark.parametrize("missing", [["layers"], ["d_model"], ["layers", "d_model"]])
def test_depth_and_width_are_found_when_left_out(missing):
    source = {"profile": "crown", "layers": 18, "d_model": 768, "budget": "180M"}
    solution = resolve({k: v for k, v in source.items() if k not in missing})
    assert abs(solution.miss) < 1e-3
    assert "found" in solution.notes[0]
    assert 8 <= solution.shape.n_layers <= 30
    assert 512 <= solution.shape.d_model <= 1152


@pytest.mark.parametrize("name", ["crown-paper/crown-18", "openelm/270m", "crown-paper/vanilla-12"])
@pytest.mark.parametrize("kind", ["parameters", "flops_per_token"])
def test_the_isotropic_model_of_equal_cost_is_equal_and_isotropic(name, kind):
    shape = specification.preset(name)
    solution = solve.isotropic_of_equal_cost(shape, kind)
    assert solution.shape.uniform
    assert (solution.shape.n_layers, solution.shape.d_model) == (shape.n_layers, shape.d_model)
    assert abs(solution.miss) < 1e-3


@pytest.mark.parametrize("name", ["crown-paper/baseline-12", "smollm2/135m", "gpt2/small"])
def test_an_isotropic_model_is_its_own_of_equal_kv_cost(name):
    solution = solve.isotropic_of_equal_cost(specification.preset(name), "kv_bytes_per_token")
    assert solution.shape == specification.preset(name)
    assert (solution.miss, solution.notes) == (0, ())


@pytest.mark.parametrize("name", ["crown-paper/crown-18", "openelm/270m", "crown-paper/vanilla-12"])
def test_equal_layers_of_equal_kv_cost_are_the_mean_layer_and_say_what_they_miss(name):
    shape = specification.preset(name)
    solution = solve.isotropic_of_equal_cost(shape, "kv_bytes_per_token")
    (layer,) = set(solution.shape.layers)
    for field in ("n_kv_heads", "d_ff"):
        mean = sum(getattr(x, field) for x in shape.layers) / shape.n_layers
        assert abs(getattr(layer, field) - mean) <= 0.5
    assert layer.n_heads % layer.n_kv_heads == 0
    assert solution.achieved == cost.kv_bytes_per_token(solution.shape)
    assert (abs(solution.miss) > 1e-3) == ("nearest number of KV heads" in " ".join(solution.notes))


def test_flops_budgets_and_equal_cost_count_the_attended_length_they_are_told():
    budget = {"flops_per_token": "24M", "sequence": "1k", "attended": "causal"}
    solution = resolve({**SMALL, "profile": "crown", "budget": budget})
    assert solution.achieved == cost.flops_per_token(solution.shape, 1000, attended="causal")
    assert abs(solution.miss) < 1e-3
    twin = solve.isotropic_of_equal_cost(solution.shape, "flops_per_token", 1000, "causal").shape
    ours, theirs = (cost.flops_per_token(s, 1000, attended="causal") for s in (solution.shape, twin))
    assert theirs == pytest.approx(ours, rel=1e-3)


def test_five_arms_of_a_study_cost_the_same():
    counts = [
        cost.parameters(resolve({**SMALL, "profile": p, "budget": "2M"}).shape)
        for p in ("isotropic", "vanilla", "framed", "reverse", "crown")
    ]
    assert max(counts) / min(counts) < 1.005


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"profile": "crown", "layer": 3}, "did you mean layers"),
        ({"preset": "crown-paper/crown-81"}, "did you mean crown-paper/crown-18"),
        ({"preset": "gpt2/small", "budget": "5M"}, "cannot be combined with preset"),
        ({**SMALL, "profile": "crown", "budget": 1000}, "too small"),
        ({**SMALL, "profile": "crown", "budget": "many"}, "such as 180M"),
        ({**SMALL, "profile": "crown", "rounding": "up"}, "choose one of corenet"),
        ({"profile": "crown", "layers": 4}, "budget that finds them"),
        ({**SMALL, "profile": "crown", "q_per_kv": 2, "n_kv_heads": 2}, "not both"),
        ({**SMALL, "profile": "crown", "device": "hoper"}, "device is 'hoper'; tensor-core rounding knows"),
        (
            {**SMALL, "profile": "crown", "device": "hopper"},
            "is for rounding: tensor-core; rounding is exact",
        ),
        ({**SMALL, "profile": "crown", "budget": "5M", "aspect": 32}, "aspect is for a budget that finds"),
        ({**SMALL, "profile": "crown", "scale": "both"}, "scale is 'both', and there is no budget"),
        (
            {**SMALL, "profile": "crown", "budget": {"flops_per_token": 1, "sequence": None}},
            "sequence is None",
        ),
        ({**SMALL, "profile": "crown", "budget": {"flops_per_token": 1, "sequence": -5}}, "sequence is -5"),
        (
            {**SMALL, "profile": "crown", "budget": {"flops_per_token": 1, "sequence": 0}},
            "it must be from 1 to",
        ),
        (
            {**SMALL, "profile": "crown", "budget": {"flops_per_token": 1, "attended": "half"}},
            "full or causal",
        ),
        ({**SMALL, "profile": "crown", "budget": "1e300T"}, "such as 180M"),
        (
            {**SMALL, "profile": "crown", "n_kv_heads": 2, "budget": {"kv_bytes_per_token": "16k"}},
            "n_kv_heads 2 alone sets it, 1,024 in 8 layers",
        ),
        (
            {**SMALL, "profile": "crown", "scale": "ffn", "budget": {"kv_bytes_per_token": "16k"}},
            "kv_bytes_per_token does not grow with ffn",
        ),
        (
            {
                **SMALL,
                "profile": {"ffn": "isotropic", "heads": "isotropic"},
                "head_multipliers": {"value": 0},
                "budget": {"kv_bytes_per_token": "16k"},
            },
            "kv_bytes_per_token does not grow with heads",
        ),
        ({**SMALL, "profile": "crown", "head_dim": 15}, "even number"),
        (
            {
                "d_model": 8,
                "head_dim": 4,
                "vocabulary": 9,
                "layers": [{"n_heads": 3, "n_kv_heads": 2, "d_ff": 1}],
            },
            "valid are 1, 3",
        ),
        (
            {
                "d_model": 8,
                "head_dim": 4,
                "vocabulary": 9,
                "layers": [{"n_heads": -3, "n_kv_heads": 2, "d_ff": 1}],
            },
            "layer 0: n_heads is -3",
        ),
        ({"d_model": 8, "head_dim": 4, "vocabulary": 9, "layers": []}, "at least one layer"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_in_one_line(source, says):
    with pytest.raises(UserError, match=says) as caught:
        resolve(source)
    assert "\n" not in str(caught.value)


def test_fixed_kv_heads_and_fixed_ratio():
    fixed = resolve({**SMALL, "profile": "crown", "n_kv_heads": 2}).shape
    assert {x.n_kv_heads for x in fixed.layers} == {2}
    ratio = resolve({**SMALL, "profile": "crown", "q_per_kv": 2}).shape
    assert all(x.n_heads == 2 * x.n_kv_heads for x in ratio.layers)
    assert len({x.n_kv_heads for x in ratio.layers}) > 1


def test_ffn_and_heads_have_profiles_of_their_own():
    shape = resolve({**SMALL, "profile": {"ffn": "crown", "heads": "isotropic"}}).shape
    assert len({x.n_heads for x in shape.layers}) == 1
    assert len({x.d_ff for x in shape.layers}) > 2


@pytest.mark.parametrize(
    ("interface", "asked", "widths"),
    [
        ({"kind": "random_codes"}, {"layers": 4, "head_dim": 8, "budget": "1M"}, range(64, 4096)),
        (
            {"kind": "glyph", "font": "pillow"},
            {"layers": 9, "vocabulary": 8192, "budget": "30M"},
            range(1, 1025),
        ),
        (
            {"kind": "binary", "order": "interleaved"},
            {"head_dim": 64, "budget": "30M"},
            range(320, 4096, 320),
        ),
    ],
)
def test_a_width_that_the_interface_cannot_have_is_passed_over(interface, asked, widths):
    """64 bits take 64 channels, 32 × 32 pixels are good for 1,024 of them, and interleaved ten bits divide them."""
    solution = resolve({"profile": "isotropic", "vocabulary": 1024, "interface": interface, **asked})
    assert solution.shape.d_model in widths and abs(solution.miss) < 0.01
