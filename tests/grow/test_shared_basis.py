"""The streamed basis is that of a direct SVD of all layers side by side."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entasis.grow import shared_basis


def random_layers(count: int, M: int, N: int, rank: int | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    left = None if rank is None else draw(M, rank)
    return [draw(M, N) if left is None else left @ draw(rank, N) for _ in range(count)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 12))
def test_parity_with_a_direct_svd(count, M, N):
    layers = random_layers(count, M, N)
    basis = shared_basis.decompose(shared_basis.add_up(layers))
    u, s, vt = torch.linalg.svd(torch.cat(layers, dim=1), full_matrices=False)
    kept = int((s > shared_basis.SMALLEST * s[0]).sum())
    assert (basis.components, basis.dropped) == (kept, M - kept)
    signs = (basis.factor_MC * u[:, :kept]).sum(0).sign()
    torch.testing.assert_close(basis.factor_MC * signs, (u * s)[:, :kept], rtol=0, atol=1e-6)
    for i, w in enumerate(layers):
        v = basis.inverse_CM @ w
        torch.testing.assert_close(signs[:, None] * v, vt[:kept, i * N : (i + 1) * N], rtol=0, atol=1e-5)
        torch.testing.assert_close(basis.factor_MC @ v, w, rtol=0, atol=1e-9)


def test_chunks_make_no_difference(monkeypatch):
    layers = random_layers(3, 11, 7)
    whole = shared_basis.decompose(shared_basis.add_up(layers))
    monkeypatch.setattr(shared_basis, "CHUNK", 4)
    parts = shared_basis.decompose(shared_basis.add_up(layers))
    torch.testing.assert_close(parts.factor_MC, whole.factor_MC, rtol=0, atol=1e-9)


def test_dependent_rows_are_dropped_and_counted():
    layers = random_layers(4, 10, 5, rank=3)
    basis = shared_basis.decompose(shared_basis.add_up(layers))
    assert (basis.components, basis.dropped) == (3, 7)
    for w in layers:
        torch.testing.assert_close(basis.factor_MC @ (basis.inverse_CM @ w), w, rtol=0, atol=1e-9)


def test_the_quick_way_is_the_basis_up_to_a_rotation_and_falls_back_where_rows_depend():
    for rank, dropped in ((None, 0), (3, 7)):
        layers = random_layers(4, 10, 5, rank)
        components, found = shared_basis.whiten(shared_basis.add_up(layers))
        assert found == dropped
        v = torch.cat([components(w) for w in layers], dim=1)
        torch.testing.assert_close(v @ v.T, torch.eye(10 - dropped).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("smallest", "dropped"), [(3e-7, 1), (3e-6, 0), (3e-5, 0)])
def test_the_quick_way_sees_rows_that_nearly_depend(smallest, dropped):
    """No pivot of Cholesky's tells: each is larger than the smallest singular value, here ten times."""
    generator = torch.Generator().manual_seed(0)
    u_MM, v_MM = (
        torch.linalg.qr(torch.randn(256, 256, generator=generator, dtype=torch.float64))[0] for _ in range(2)
    )
    s_M = torch.ones(256, dtype=torch.float64)
    s_M[-1] = smallest
    layers = [(u_MM * s_M) @ v_MM[:, half] for half in (slice(128), slice(128, None))]
    gram_MM = shared_basis.add_up(layers)
    assert torch.linalg.cholesky_ex(gram_MM)[1] == 0
    components, found = shared_basis.whiten(gram_MM)
    assert found == shared_basis.decompose(shared_basis.add_up(layers)).dropped == dropped
    v = torch.cat([components(w) for w in layers], dim=1)
    torch.testing.assert_close(v @ v.T, torch.eye(256 - dropped).double(), rtol=0, atol=2e-3)
