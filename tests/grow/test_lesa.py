"""Predicted matrices: against dense solutions, on layers that can and cannot be predicted."""

from dataclasses import replace

import pytest
import torch

from entasis.errors import UserError
from entasis.grow import lesa, predictor, ridge, triples
from entasis.grow.growth import read_operator
from entasis.grow.network_settings import NetworkSettings
from entasis.shape.shapes import LayerShape, ModelShape

L, M, N = 10, 12, 8


def independent(count: int = L) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(M, N, generator=generator) for _ in range(count)]


def turning() -> list[torch.Tensor]:
    """Each layer the one before, its columns rotated in pairs: a linear rule predicts the middle exactly, the mean of
    the neighbours has half of the signs wrong."""
    angles = torch.tensor([0.5, 1.1, 2.1, 2.7])
    turn = torch.block_diag(*(torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]]) for a in angles))
    layers = [independent(1)[0]]
    while len(layers) < L:
        layers.append(layers[-1] @ turn)
    return layers


def alike() -> list[torch.Tensor]:
    return [independent(1)[0] + 0.1 * w for w in independent()]


def fit_network(layers, settings=NetworkSettings(), seed=0):  # noqa: B008
    return predictor.fit(layers.__getitem__, L, triples.split(L, 0), settings, seed=seed)


def told(layers, fitted) -> dict:
    return lesa.describe(fitted, layers.__getitem__, triples.split(L, 0)) | {"inserted_norm_ratio": 1.0}


@pytest.mark.parametrize("chunk", [3, 1024])
def test_ridge_is_the_dense_solution_in_the_direct_svd(chunk, monkeypatch):
    monkeypatch.setattr(ridge, "CHUNK", chunk)
    layers, split = turning(), triples.split(L, 0)
    layers = [w + 0.3 * noise for w, noise in zip(layers, independent(), strict=True)]
    fitted = ridge.fit(layers.__getitem__, L, split)
    u, s, _ = torch.linalg.svd(torch.cat(layers, dim=1).double(), full_matrices=False)
    v = [(u / s).T @ w.double() for w in layers]
    x = torch.cat([torch.cat([v[i - 1], v[i + 1]], dim=1) for i in split.train])
    y = torch.cat([v[i] for i in split.train])
    strengths = {}
    for strength in ridge.STRENGTHS:
        square = x.T @ x
        b = torch.linalg.solve(square + strength * square.diagonal().mean() * torch.eye(2 * N), x.T @ y)
        missed = [v[i] - torch.cat([v[i - 1], v[i + 1]], dim=1) @ b for i in split.held_out]
        strengths[strength] = (sum(float(m.square().sum()) for m in missed), b)
    best = min(strengths, key=lambda strength: strengths[strength][0])
    assert fitted.strength == best
    torch.testing.assert_close(
        torch.cat([fitted.below_NN, fitted.above_NN]).double(), strengths[best][1], rtol=0, atol=1e-4
    )
    between = (u * s) @ torch.cat([v[3], v[4]], dim=1) @ strengths[best][1]
    torch.testing.assert_close(fitted(layers[3], layers[4]).double(), between, rtol=0, atol=1e-3)


def test_ridge_finds_a_rule_that_averaging_misses():
    found = told(turning(), ridge.fit(turning().__getitem__, L, triples.split(L, 0)))
    assert found["predicted"]["cosine"] > 0.99 and found["predicted"]["norm_ratio"] == pytest.approx(
        1, abs=0.05
    )
    assert found["average"]["cosine"] < 0.5
    assert lesa.warnings({"query": found}) == []


def test_ridge_of_unrelated_layers_shrinks_to_nothing():
    layers, split = independent(), triples.split(L, 0)
    nothing = told(layers, ridge.fit(layers.__getitem__, L, split))
    assert nothing["predicted"]["norm_ratio"] < 0.3 and nothing["predicted"]["error"] < 1.1


def test_the_norm_loss_gives_unrelated_layers_length_without_content():
    layers = independent()
    for norm_loss, shortest, longest in (("none", 0.0, 0.5), ("batch", 0.7, 1.3), ("row", 0.7, 1.3)):
        weight = 0.5 if norm_loss != "none" else 0.0
        settings = NetworkSettings(norm_loss=norm_loss, norm_weight=weight, epochs=60, patience=60)
        found = told(layers, fit_network(layers, settings))
        assert shortest < found["predicted"]["norm_ratio"] < longest, norm_loss
        assert abs(found["predicted"]["cosine"]) < 0.5


def test_averaging_that_predicts_better_is_said():
    found = told(alike(), fit_network(alike()))
    assert found["average"]["cosine"] > 0.97 > found["predicted"]["cosine"]
    [line] = lesa.warnings({"gate": found, "up": found})
    assert line.startswith("gate, up: the mean of the neighbours predicts held-out layers better")


def test_predicting_nothing_is_said_and_so_are_layers_of_nothing():
    nothing = {"predicted": {"cosine": 0.01}, "average": {"cosine": 0.02}, "inserted_norm_ratio": 0.003}
    blind, small = lesa.warnings({"query": nothing})
    assert blind.startswith("query: neither the predictor nor the mean of the neighbours")
    assert small.startswith("query: next to nothing in the new layers")


def test_training_ends_early_with_the_best_network_and_follows_from_the_seed():
    layers = independent()
    settings = NetworkSettings(epochs=200, patience=3, lr=0.01)
    a, b, other = (fit_network(layers, settings, seed) for seed in (0, 0, 1))
    assert a.epochs < 190
    assert torch.equal(a(layers[0], layers[1]), b(layers[0], layers[1]))
    assert not torch.equal(a(layers[0], layers[1]), other(layers[0], layers[1]))
    short = fit_network(layers, settings.replaced(epochs=a.epochs))
    assert torch.equal(a(layers[0], layers[1]), short(layers[0], layers[1]))
    to_the_end = fit_network(layers, settings.replaced(epochs=a.epochs + 3, patience=0))
    assert to_the_end.epochs == a.epochs + 3


def test_raw_rows_are_what_the_network_sees_and_gives():
    layers = alike()
    fitted = fit_network(layers, NetworkSettings(basis="none"))
    with torch.no_grad():
        rows = fitted.network(torch.cat([layers[3], layers[4]], dim=1))
    torch.testing.assert_close(fitted(layers[3], layers[4]), rows)
    with pytest.raises(UserError, match="NaN or infinity"):
        fit_network([*layers[:-1], torch.full((M, N), torch.nan)], NetworkSettings(basis="none"))


@pytest.mark.parametrize("fit", [ridge.fit, lambda *a: predictor.fit(*a, NetworkSettings(), seed=0)])
def test_a_matrix_that_is_zero_everywhere_is_refused(fit):
    with pytest.raises(UserError, match="zero in all layers"):
        fit(([torch.zeros(M, N)] * L).__getitem__, L, triples.split(L, 0))


def test_effective_rank():
    assert lesa.effective_rank(torch.eye(5)) == pytest.approx(5)
    assert lesa.effective_rank(torch.ones(4, 9)) == pytest.approx(1, abs=1e-5)
    assert lesa.effective_rank(torch.zeros(3, 2)) == 0


def test_what_has_no_common_basis_is_refused_by_name():
    layer = LayerShape(4, 2, 12)
    shape = ModelShape(d_model=8, head_dim=4, vocabulary=16, layers=(layer,) * 5)
    for name in ("lesa", "lesa_ridge", "aligned_lesa"):
        operator = read_operator(name, {"after": [1]}, "grow")
        operator.plan(shape)
        with pytest.raises(UserError, match=f"{name}: layer 2 has another shape than layer 0"):
            operator.plan(replace(shape, layers=(layer, layer, LayerShape(4, 2, 16), layer, layer)))
        with pytest.raises(UserError, match=f"{name}: the model has 3 layers; four are needed"):
            operator.plan(replace(shape, layers=(layer,) * 3))
    spoilt = [torch.full((M, N), float("nan")), *independent()[1:]]
    with pytest.raises(UserError, match="not finite"):
        fit_network(spoilt)


def test_the_memory_that_is_told_is_that_of_eight_billion_parameters_within_eight_gb():
    """Of Llama-3-8B; measured by benchmarks/growth_scale.py."""
    layer = LayerShape(32, 8, 14336)
    shape = ModelShape(d_model=4096, head_dim=128, vocabulary=128256, layers=(layer,) * 32)
    assert 6e9 < read_operator("lesa_ridge", {"after": "15..30"}, "grow").memory(shape) < 8e9
    assert read_operator("average", {"after": "15..30"}, "grow").memory(shape) == 0


def test_a_batch_of_one_row_is_learnt_from_like_any_other():
    """Nine triples of nine rows and batches of 64 leave one; that one has an axis too."""
    layers = [torch.randn(9, 9, generator=torch.Generator().manual_seed(i)) for i in range(L)]
    left = fit_network(layers, NetworkSettings(epochs=1, batch=len(triples.split(L, 0).train) * 9 - 1))
    assert left(layers[0], layers[1]).shape == (9, 9)
    alone = fit_network(layers, NetworkSettings(epochs=1, batch=1))
    assert alone(layers[0], layers[1]).isfinite().all()
