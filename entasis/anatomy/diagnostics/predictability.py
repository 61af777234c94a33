"""Weight predictability: how well neighbouring layers predict a layer's weights, held out and beside controls.

Every entry of a matrix is predicted from the same entry in up to four neighbouring layers (two below, two above) by ridge
regression, fitted on one random half of the entries and judged on the other. Only layers of the same shape are compared;
a layer whose neighbours differ in shape has no value here.

R² is 1 − Σ(w − ŵ)² / Σ(w − mean w)² of the held-out half: below 0 is worse than the matrix's mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch

from entasis.anatomy.intervals import loss_change
from entasis.anatomy.layer_sweep import score_model
from entasis.anatomy.layer_weights import Weights, copy_with_weights, read_matrices, read_weights
from entasis.anatomy.measures import Row, measure
from entasis.anatomy.subject import Subject
from entasis.model.transformer import Transformer

RIDGE = 1e-3
"""Of the features' mean variance."""
REACH = 2
ENTRIES = 1 << 17
"""Most entries of a matrix that are fitted on; a random choice of larger ones is as good and much quicker."""
SAMPLE = 1 << 15
"""Entries that the correlation of deltas is computed on."""
PERMUTATIONS = 200


@measure(
    "predictability",
    kind="predictability",
    gives={
        "weight_r2": "held-out R² of a matrix from its neighbours in depth",
        "weight_r2_mean": "control: R² of the plain mean of all other layers of this shape",
        "weight_r2_permuted": "control: the same ridge from as many other layers, drawn at random from those that are no "
        "neighbours; none where fewer are left",
        "weight_r2_untrained": "control: the same ridge in a model at its initial values",
    },
)
def predictability(subject: Subject) -> Iterable[Row]:
    models = (subject.model, subject.untrained().model)
    for layer in range(subject.n_layers):
        subject.progress(layer, subject.n_layers)
        near, alike = _near(subject, layer), _alike(subject, layer)
        if not near:
            continue
        far = [i for i in alike if i not in near]
        order = torch.randperm(len(far), generator=subject.generator("permuted", layer))
        anywhere = [far[int(i)] for i in order[: len(near)]]
        for name in read_matrices(subject.model, layer):
            target, halves = name.split(".")[1], _halves(subject, layer, name)
            for quantity, model, layers in (
                ("weight_r2", models[0], near),
                ("weight_r2_permuted", models[0], anywhere),
                ("weight_r2_untrained", models[1], near),
            ):
                if len(layers) < len(near):  # a control with fewer features would come out too low
                    continue
                x, y = _features(model, layers, name), _entries(model, layer, name)
                fit, held = halves
                slope_F, intercept = fit_ridge(x[fit], y[fit])
                guess = x[held].double() @ slope_F + intercept
                yield Row(quantity, layer, score_prediction(y[held], guess), target)
            y, held = _entries(subject.model, layer, name), halves[1]
            mean = torch.stack([_entries(subject.model, i, name)[held] for i in alike]).mean(0)
            yield Row("weight_r2_mean", layer, score_prediction(y[held], mean), target)
    subject.progress(subject.n_layers, subject.n_layers)


@measure(
    "delta_correlation",
    kind="predictability",
    gives={
        "delta_deviation": "correlation of successive weight differences minus what independent layers give "
        "(−0.5 where they vary alike); the interval is that of permuted entries, moved to the value"
    },
)
def delta_correlation(subject: Subject) -> Iterable[Row]:
    """Between W_l − W_{l−1} and W_{l+1} − W_l. Entries of each layer are permuted for the null."""
    for layer in range(1, subject.n_layers - 1):
        subject.progress(layer - 1, subject.n_layers - 2)
        trio = [layer - 1, layer, layer + 1]
        if len({subject.shape.layers[i] for i in trio}) > 1:
            continue
        for name in read_matrices(subject.model, layer):
            generator = subject.generator("delta", layer, name)
            size = read_weights(subject.model, layer)[name].numel()
            chosen = torch.randperm(size, generator=generator)[:SAMPLE]
            a, b, c = (_entries(subject.model, i, name)[chosen] for i in trio)
            null = np.array(
                [
                    _correlation(b - _permuted(a, generator), _permuted(c, generator) - b)
                    for _ in range(PERMUTATIONS)
                ]
            )
            value = _correlation(b - a, c - b) - null.mean()
            low, high = value - np.quantile(null - null.mean(), [0.975, 0.025])
            yield Row("delta_deviation", layer, float(value), name.split(".")[1], float(low), float(high))
    subject.progress(1, 1)


@measure(
    "replacement",
    kind="predictability",
    gives={
        "replaced": "change in loss, nats per token, when the target's number of layers, the most predictable first, "
        "is replaced by their predictions"
    },
)
def replacement(subject: Subject) -> Iterable[Row]:
    """1, 2, 4, … layers. Every prediction is from the original weights; norms and biases stay the layer's own."""
    predicted: dict[int, tuple[float, Weights]] = {}
    for layer in range(subject.n_layers):
        if near := _near(subject, layer):
            predicted[layer] = _predict(subject, layer, near)
    ranked = sorted(predicted, key=lambda i: predicted[i][0], reverse=True)
    clean = score_model(subject)
    count = 1
    while count <= len(ranked):
        changes = {i: predicted[i][1] for i in ranked[:count]}
        nats = score_model(dataclasses.replace(subject, model=copy_with_weights(subject.model, changes)))
        found = loss_change(nats[None], clean, subject.text.document_tokens, seed=subject.seed)
        yield found.row(0, "replaced", None, str(count))
        count *= 2


def fit_ridge(x_NF: torch.Tensor, y_N: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Coefficients [F] and intercept of ridge regression, in fp64."""
    x, y = x_NF.double(), y_N.double()
    centre_F, mean = x.mean(0), y.mean()
    gram_FF = (x - centre_F).T @ (x - centre_F) / len(x)
    strength = RIDGE * gram_FF.diagonal().mean().clamp_min(1e-30)
    cross_F = (x - centre_F).T @ (y - mean) / len(x)
    slope_F = torch.linalg.solve(gram_FF + strength * torch.eye(len(gram_FF), dtype=x.dtype).to(x), cross_F)
    return slope_F, float(mean - centre_F @ slope_F)


def score_prediction(y_N: torch.Tensor, guess_N: torch.Tensor) -> float:
    """Share of the variance explained; NaN where there is none."""
    y, guess = y_N.double(), guess_N.double()
    spread = float((y - y.mean()).square().sum())
    return 1 - float((y - guess).square().sum()) / spread if spread > 0 else float("nan")


def _near(subject: Subject, layer: int) -> list[int]:
    """Up to two layers on either side, as long as they have this layer's shape."""
    shapes, result = subject.shape.layers, []
    for step in (-1, 1):
        for i in range(layer + step, layer + step * (REACH + 1), step):
            if not 0 <= i < len(shapes) or shapes[i] != shapes[layer]:
                break
            result.append(i)
    return sorted(result)


def _alike(subject: Subject, layer: int) -> list[int]:
    """All other layers of this shape."""
    shapes = subject.shape.layers
    return [i for i, shape in enumerate(shapes) if shape == shapes[layer] and i != layer]


def _entries(model: Transformer, layer: int, name: str) -> torch.Tensor:
    return read_weights(model, layer)[name].flatten()


def _features(model: Transformer, layers: list[int], name: str) -> torch.Tensor:
    return torch.stack([_entries(model, i, name) for i in layers], dim=1)


def _halves(subject: Subject, layer: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two disjoint random choices of entries: to fit on and to judge on."""
    size = read_weights(subject.model, layer)[name].numel()
    order = torch.randperm(size, generator=subject.generator("halves", layer, name))
    half = min(size // 2, ENTRIES)
    return order[:half], order[half : 2 * half]


def _predict(subject: Subject, layer: int, near: list[int]) -> tuple[float, Weights]:
    """Mean held-out R² over the layer's matrices, and all of them as predicted."""
    scores, result = [], {}
    for name, w in read_matrices(subject.model, layer).items():
        fit, held = _halves(subject, layer, name)
        x, y = _features(subject.model, near, name), w.flatten()
        slope_F, intercept = fit_ridge(x[fit], y[fit])
        guess = (x.double() @ slope_F + intercept).to(w.dtype)
        scores.append(score_prediction(y[held], guess[held]))
        result[name] = guess.view_as(w)
    return float(np.mean(scores)), result


def _permuted(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return x[torch.randperm(len(x), generator=generator)]


def _correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = (x - x.mean()).double(), (y - y.mean()).double()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size > 0 else float("nan")
