"""What the decoder promises whatever its layers look like."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from entasis.errors import UserError
from entasis.evaluate.generation import Sampling, choose, generate
from entasis.model import loss, parametrisation, weights
from entasis.model.cache import KVCache
from entasis.model.initialisation import init_weights
from entasis.model.loss import summed_nll
from entasis.model.transformer import Transformer
from entasis.shape import LayerShape, ModelShape

UNEQUAL = (LayerShape(4, 2, 64), LayerShape(2, 1, 0), LayerShape(0, 0, 40), LayerShape(6, 2, 96))


def shape(**changes):
    return ModelShape(
        **{"d_model": 32, "head_dim": 8, "vocabulary": 101, "layers": UNEQUAL, "context": 64, **changes}
    )


def built(seed=0, attention="sdpa", **changes):
    model = Transformer(shape(**changes), attention=attention)
    init_weights(model, seed)
    with torch.no_grad():
        for p in model.parameters():  # large enough that a mistake is not lost in rounding
            p.mul_(3)
    return model


VARIANTS = [
    {},
    {"qk_norm": "head", "tied_embeddings": True},
    {"qk_norm": "full", "norm_placement": "reordered", "norm_scaling": True},
    {
        "positions": "learned",
        "norm": "layernorm",
        "norm_bias": True,
        "ffn": "gelu",
        "qkv_bias": True,
        "head_bias": True,
    },
    {"residual_scale": 0.5, "attention_scale": 1 / 8, "logit_scale": 0.25},
]


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("attention", ["sdpa", "plain"])
def test_reading_with_a_cache_equals_reading_at_once(changes, attention):
    # In fp64, as what fp32 rounds away depends on the tokens and would hide a small mistake.
    model = built(attention=attention, **changes).double()
    tokens_BT = torch.randint(0, 101, (3, 20))
    cache = KVCache(model.shape, 3, 20, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        whole = model(tokens_BT)
        parts = [model(tokens_BT[:, a:b], cache=cache) for a, b in ((0, 7), (7, 8), (8, 15), (15, 20))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=0)


@pytest.mark.parametrize("changes", VARIANTS)
def test_both_attentions_agree(changes):
    tokens_BT = torch.randint(0, 101, (2, 30))
    with torch.no_grad():
        one, other = (built(attention=a, **changes).double()(tokens_BT) for a in ("sdpa", "plain"))
    torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "plain"])
def test_masked_documents_are_read_as_if_alone(attention):
    model = built(attention=attention)
    first, second = torch.randint(0, 101, (1, 9)), torch.randint(0, 101, (1, 12))
    ids_BT = torch.tensor([[0] * 9 + [1] * 12])
    with torch.no_grad():
        together = model(torch.cat([first, second], 1), document_ids_BT=ids_BT)
        # Rotary attention depends on distances alone, so the second document may begin anywhere.
        torch.testing.assert_close(together[:, 9:], model(second), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together[:, :9], model(first), atol=1e-5, rtol=1e-5)
        unmasked = model(torch.cat([first, second], 1))
    assert (unmasked[:, 9:] - together[:, 9:]).abs().max() > 1e-3


def test_flex_attention_keeps_to_documents_like_the_mask():
    """Forward only: it has no backward pass on a CPU. Rows of 300 tokens are several blocks, the last not whole."""
    tokens_BT, ids_BT = torch.randint(0, 101, (2, 300)), (torch.rand(2, 300) < 0.02).cumsum(1)
    flex = built(attention="flex")
    seen = []

    def backend(graph, _inputs):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        compiled = torch.compile(flex.loss, fullgraph=True, backend=backend)
        found = compiled(tokens_BT, tokens_BT, document_ids_BT=ids_BT)
        torch.testing.assert_close(found, flex.loss(tokens_BT, tokens_BT, document_ids_BT=ids_BT))
        assert abs(found - flex.loss(tokens_BT, tokens_BT)) > 1
    layers_with_heads = sum(layer.n_heads > 0 for layer in UNEQUAL)
    assert sum("flex_attention" in str(target) for target in seen) == layers_with_heads


@pytest.mark.parametrize("changes", VARIANTS)
def test_no_position_sees_the_future(changes):
    model = built(**changes)
    tokens_BT = torch.randint(0, 101, (1, 20))
    changed = tokens_BT.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 101
    with torch.no_grad():
        a, b = model(tokens_BT), model(changed)
    assert torch.equal(a[:, :12], b[:, :12])
    assert (a[:, 12:] - b[:, 12:]).abs().max() > 1e-3


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 40),
    v=st.integers(2, 60),
    at_once=st.integers(1, 400),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.3]),
    seed=st.integers(0, 99),
)
def test_the_chunked_loss_and_its_gradients_equal_full_cross_entropy(n, v, at_once, bias, scale, seed):
    torch.manual_seed(seed)
    x, w = torch.randn(n, 7, requires_grad=True), torch.randn(v, 7, requires_grad=True)
    b = torch.randn(v, requires_grad=True) if bias else None
    targets = torch.randint(0, v, (n,))
    targets[torch.rand(n) < 0.2] = -100
    inputs = [x, w, *([b] if bias else [])]
    full = F.cross_entropy(F.linear(x, w, b).double() * scale, targets, reduction="sum")
    chunked = summed_nll(x, w, b, targets, scale, at_once=at_once)
    torch.testing.assert_close(chunked.double(), full, atol=1e-4, rtol=1e-5)
    for found, expected in zip(
        torch.autograd.grad(chunked * 0.5, inputs), torch.autograd.grad(full * 0.5, inputs), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_loss_in_bf16_is_summed_in_fp32():
    torch.manual_seed(0)
    x, w, targets = torch.randn(4096, 32), torch.randn(500, 32) / 6, torch.randint(0, 500, (4096,))
    exact = F.cross_entropy(x @ w.T, targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        for at_once in (1 << 30, 50_000):
            found = summed_nll(x, w, None, targets, at_once=at_once)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wanted", ["", "x", "xwb"])
def test_chunks_are_the_same_as_an_operator_and_as_traced_code(bias, wanted):
    """On a CPU they are an operator that compiled code calls, elsewhere the compiler sees into them."""
    torch.manual_seed(0)
    x, w, b = torch.randn(20, 8), torch.randn(30, 8), torch.randn(30) if bias else None
    targets = torch.randint(0, 30, (20,))
    targets[3] = -100
    wants = ["x" in wanted, "w" in wanted, bias and "b" in wanted]
    args = (x, w, b, targets, 0.3, 6, torch.float32, wants)
    torch.library.opcheck(loss._opaque, args)
    expected = loss._by_chunks(*args)
    assert len(expected) == 1 + sum(wants)
    torch.testing.assert_close(loss._opaque(*args), expected)
    torch.testing.assert_close(torch.compile(loss._by_chunks, fullgraph=True)(*args), expected)


@pytest.mark.parametrize("frozen", ["x", "w", "b", "xw", "wb", "xb"])
def test_what_is_frozen_gets_no_gradient_and_leaves_the_others_as_they_are(frozen):
    torch.manual_seed(0)
    x, w, b = torch.randn(20, 8), torch.randn(30, 8), torch.randn(30)
    targets = torch.randint(0, 30, (20,))
    every = {"x": x, "w": w, "b": b}

    def gradients(learning: str) -> dict[str, torch.Tensor]:
        for name, tensor in every.items():
            tensor.requires_grad_(name in learning)
        total = summed_nll(x, w, b, targets, 0.3, at_once=200)
        return dict(zip(learning, torch.autograd.grad(total, [every[n] for n in learning]), strict=True))

    whole = gradients("xwb")
    for name, found in gradients("".join(n for n in "xwb" if n not in frozen)).items():
        assert torch.equal(found, whole[name])


def test_the_gradients_in_bf16_are_as_exact_as_bf16_whatever_the_scale():
    torch.manual_seed(0)
    x, w = torch.randn(4096, 32, requires_grad=True), (torch.randn(500, 32) / 6).requires_grad_()
    targets = torch.randint(0, 500, (4096,))
    exact = torch.autograd.grad(F.cross_entropy(x @ w.T * 0.3, targets, reduction="sum"), [x, w])
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(summed_nll(x, w, None, targets, 0.3, at_once=50_000), [x, w])
    for a, b in zip(found, exact, strict=True):
        # Along the exact gradient rounding averages out; a scale rounded to bf16 would be off by 2e-3.
        assert abs(float((a * b).sum() / b.square().sum()) - 1) < 3e-4
        assert float((a - b).norm() / b.norm()) < 0.01


def test_the_same_name_and_shape_starts_from_the_same_values():
    crown = Transformer(shape())
    other = Transformer(shape(layers=(LayerShape(4, 2, 96), LayerShape(2, 1, 0), *UNEQUAL[2:])))
    for model in (crown, other):
        init_weights(model, 5)
    theirs = dict(other.named_parameters())
    same = [n for n, p in crown.named_parameters() if n in theirs and p.shape == theirs[n].shape]
    assert len(same) > 15
    for name in same:
        assert torch.equal(theirs[name], dict(crown.named_parameters())[name]), name
    init_weights(other, 6)
    assert not torch.equal(other.blocks[0].attention.query.weight, crown.blocks[0].attention.query.weight)


def test_initial_values_follow_the_table():
    layers = (LayerShape(16, 16, 512),) * 4
    model = Transformer(shape(d_model=128, layers=layers, vocabulary=2000))
    init_weights(model, 0)
    stds = {n: p.std().item() for n, p in model.named_parameters()}
    assert stds["embedding.tokens.weight"] == pytest.approx(0.02, rel=0.03)
    assert stds["blocks.1.feedforward.gate.weight"] == pytest.approx(0.02, rel=0.03)
    assert stds["blocks.1.feedforward.down.weight"] == pytest.approx(0.02 / 8**0.5, rel=0.03)
    assert model.norm.weight.eq(1).all()


def test_mup_takes_each_matrixs_own_fan_in_against_the_mean_layers_at_the_base_width():
    model = Transformer(shape(d_model=128, layers=(LayerShape(4, 2, 256), LayerShape(12, 6, 1024))))
    factors = parametrisation.describe(model.shape, "mup", base_width=64)
    mean = 8 * model.shape.head_dim / 128
    assert factors["blocks.0.attention.query.weight"].lr == 1 / 2
    assert factors["blocks.0.attention.output.weight"].lr == 64 * mean / (4 * model.shape.head_dim)
    assert factors["blocks.1.attention.output.weight"].lr == 64 * mean / (12 * model.shape.head_dim)
    assert factors["blocks.0.feedforward.down.weight"].lr == 320 / 256
    assert factors["blocks.1.feedforward.down.weight"].lr == 320 / 1024
    assert factors["blocks.1.feedforward.down.weight"].weight_decay == 1024 / 320
    assert factors["embedding.tokens.weight"].lr == factors["norm.weight"].lr == 1
    init_weights(model, 0, parametrisation="mup", base_width=64)
    assert model.blocks[0].attention.query.weight.std().item() == pytest.approx(0.02 / 2**0.5, rel=0.05)


def test_a_model_without_ends_is_refused_and_files_that_do_not_fit_too(tmp_path):
    model = built()
    weights.save(model, tmp_path)
    assert torch.equal(weights.load(tmp_path).head.weight, model.head.weight)
    text = (tmp_path / "shape.json").read_text()
    (tmp_path / "shape.json").write_text(text.replace('"d_ff": 64', '"d_ff": 65'))
    with pytest.raises(UserError, match=r"feedforward\.(gate|up|down)\.weight is"):
        weights.load(tmp_path)
    (tmp_path / "shape.json").write_text(text.replace('"qk_norm": "none"', '"qk_norm": "head"'))
    with pytest.raises(UserError, match=r"(query|key)_norm\.weight is missing"):
        weights.load(tmp_path)
    (tmp_path / "shape.json").write_text(text)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"damaged: .* or cut short"):
        weights.load(tmp_path)


def test_greedy_generation_equals_reading_again_each_time_and_ignores_its_neighbours():
    model = built(attention="plain")
    prompts = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6]]
    found = [[] for _ in prompts]
    for step in generate(model, prompts, tokens=10, sampling=Sampling(temperature=0)):
        for row, token in zip(found, step, strict=True):
            row += [] if token is None else [token]
    for prompt, row in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(10):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert row == ids[len(prompt) :]


def test_generation_stops_at_the_stop_token_and_repeats_with_its_seed():
    model = built()
    first, again, other = (
        [s[0] for s in generate(model, [[1]], tokens=30, sampling=Sampling(seed=seed))] for seed in (1, 1, 2)
    )
    assert first == again != other
    stopped = [s[0] for s in generate(model, [[1]], tokens=30, sampling=Sampling(seed=1), stop=[first[4]])]
    assert stopped == first[: first.index(first[4])]


def test_filters_leave_only_what_they_say():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]]).repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)
    p = logits[0].softmax(-1)
    assert set(choose(logits, Sampling(top_k=2), generator).tolist()) == {0, 1}
    assert set(choose(logits, Sampling(top_p=float(p[0]) + 0.01), generator).tolist()) == {0, 1}
    assert set(choose(logits, Sampling(min_p=float(p[1] / p[0]) - 0.01), generator).tolist()) == {0, 1}
    drawn = torch.bincount(choose(logits, Sampling(), generator), minlength=5) / 4000
    torch.testing.assert_close(drawn, p, atol=0.03, rtol=0)


def test_the_whole_loss_is_one_graph_for_twelve_different_layers():
    layers = tuple(LayerShape(1 + i % 4, 1, 16 + 8 * i) for i in range(12))
    model = built(layers=layers, attention="plain")
    tokens_BT = torch.randint(0, 101, (2, 17))
    explained = torch._dynamo.explain(model.loss)(tokens_BT[:, :-1], tokens_BT[:, 1:])
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
