"""Attention by blocks of queries against the same in one piece, in fp64."""

import pytest
import torch

from entasis.model import plain_attention as module
from entasis.model.plain_attention import plain_attention

# batch, groups, heads in a group, queries, keys, width: one block, several, an uneven last one, a cache in front
SIZES = [(2, 1, 1, 40, 40, 8), (2, 2, 3, 300, 300, 8), (1, 3, 1, 256, 256, 16), (2, 2, 2, 200, 231, 8), (2, 2, 2, 1, 9, 8)]  # fmt: skip


def inputs(B, G, R, T, S, K, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = ((B, G, R, T, K), (B, G, S, K), (B, G, S, K), (B, G, R, T, K))
    return [torch.randn(*size, generator=generator).bfloat16().to(dtype).requires_grad_() for size in sizes]


def documents(B, T, S):
    """Causal, and every other position its own document: what `attention_mask` makes of ids."""
    ids = torch.arange(S).expand(B, S) // 7
    return (ids[:, S - T :, None] == ids[:, None, :]).tril(S - T)


def in_one_piece(q, k, v, mask):
    T, S = q.shape[3], k.shape[2]
    allowed = torch.ones(T, S, dtype=torch.bool).tril(S - T) if mask is None else mask[:, None, None]
    scores = q @ k.unsqueeze(2).transpose(-1, -2)
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v.unsqueeze(2)


def with_gradients(attend, q, k, v, dy, mask):
    y = attend(q, k, v, mask)
    return [y, *torch.autograd.grad(y, (q, k, v), dy)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_output_and_gradients_equal_attention_in_one_piece(size, masked):
    q, k, v, dy = inputs(*size)
    mask = documents(size[0], *size[3:5]) if masked else None
    expected = with_gradients(in_one_piece, q, k, v, dy, mask)
    torch.testing.assert_close(with_gradients(plain_attention, q, k, v, dy, mask), expected)


@pytest.mark.parametrize("size", SIZES)
def test_bf16_errs_by_a_few_roundings(size):
    """Scores, weights and their gradients are each rounded once, by up to 2⁻⁹ of themselves; sums are wider."""
    exact = with_gradients(in_one_piece, *inputs(*size), None)
    found = with_gradients(plain_attention, *inputs(*size, torch.bfloat16), None)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() <= 2**-6 * b.norm()


def test_gradients_of_shared_keys_are_summed_in_fp32():
    """64 heads in 4 blocks add up to 256 parts of one gradient; summed in bf16, small parts would be lost."""
    q, k, v, dy = inputs(1, 1, 64, 512, 512, 8)
    exact = with_gradients(in_one_piece, q, k, v, dy, None)
    found = with_gradients(plain_attention, *inputs(1, 1, 64, 512, 512, 8, torch.bfloat16), None)
    for a, b in zip(found[2:], exact[2:], strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 0.015


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_the_same_to_the_bit(dtype, masked):
    torch._dynamo.reset()
    q, k, v, dy = inputs(2, 2, 2, 150, 150, 8, dtype)
    mask = documents(2, 150, 150) if masked else None
    compiled = torch.compile(plain_attention, fullgraph=True, backend="aot_eager")
    expected = with_gradients(plain_attention, q, k, v, dy, mask)
    for found, want in zip(with_gradients(compiled, q, k, v, dy, mask), expected, strict=True):
        assert torch.equal(found, want)


def test_the_operators_keep_what_operators_promise():
    q, k, v, dy = (x.detach() for x in inputs(2, 2, 2, 150, 160, 8, torch.float32))
    torch.library.opcheck(module._opaque_forward, (q, k, v, None))
    torch.library.opcheck(module._opaque_forward, (q, k, v, documents(2, 150, 160)))
    _, *weights = module._forward(q, k, v, None)
    torch.library.opcheck(module._opaque_backward, (dy, q, k, v, weights))
