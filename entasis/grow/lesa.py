"""New layers whose matrices are predicted from the two neighbours, and how good the predictions are.

    report = {}
    for name, tensor in lesa.predict_matrices(read, shape, {16: 15}, fit, seed=0, report=report):
        ...                                                     # every matrix of the new layer 16, after layer 15

A predictor is fitted to one type of matrix at a time (query, key, … over all layers), which is read one layer after
another. Beside each stands how well it does on triples that were held out, and how well the mean of the two neighbours does on
the same triples: the rule that a predictor has to beat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

from entasis.grow import triples
from entasis.grow.resize import Read
from entasis.grow.triples import Split
from entasis.shape import layout
from entasis.shape.shapes import ModelShape

Progress = Callable[[int, int], None]
"""(done, total), in entries of matrices."""
NOTHING = 0.05
"""A held-out cosine below this is called nothing, and so is a share of the neighbours' length."""


class Predictor(Protocol):
    """below [M, N], above [M, N] → between [M, N], fp32."""

    @property
    def dropped(self) -> int:
        """Components left out of the basis."""
        ...

    def __call__(self, below_MN: torch.Tensor, above_MN: torch.Tensor) -> torch.Tensor: ...

    def told(self) -> dict[str, float]:
        """What a report says of the fit."""
        ...


class Fit(Protocol):
    """Fits a predictor to the matrices that `read` gives of each layer."""

    def __call__(
        self,
        read: Callable[[int], torch.Tensor],
        n_layers: int,
        split: Split,
        *,
        seed: int,
        progress: Callable[[float], None],
    ) -> Predictor: ...


def predict_matrices(
    read: Read,
    shape: ModelShape,
    places: Mapping[int, int],
    fit: Fit,
    *,
    seed: int,
    report: dict[str, Any],
    progress: Progress = lambda done, total: None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the grown model, tensor) of every matrix of the new layers, by type of matrix.

    `places` says for each new layer's index the old layer that it comes after. `report` is filled on the way, see
    `describe`.
    """
    split = triples.split(shape.n_layers, seed)
    report |= {"held_out_layers": list(split.held_out), "matrices": {}, "warnings": []}
    matrices = [p for p in layout.layer_parameters(shape, 0) if p.is_matrix]
    done, total = 0, sum(p.count for p in matrices)
    like = read("norm.weight")
    for p in matrices:
        inside = p.name.removeprefix("blocks.0.")

        def layer(i: int, inside: str = inside) -> torch.Tensor:
            return read(f"blocks.{i}.{inside}").cpu()

        def advance(part: float, start: int = done, count: int = p.count) -> None:
            progress(start + int(0.9 * part * count), total)

        predictor = fit(layer, shape.n_layers, split, seed=seed, progress=advance)
        told = describe(predictor, layer, split)
        lengths = []
        for new, below in places.items():
            pair = layer(below), layer(below + 1)
            made = predictor(*pair)
            lengths.append(_ratio(made, *pair))
            yield f"blocks.{new}.{inside}", made.to(like)
            del made, pair
        report["matrices"][p.role] = {**told, "inserted_norm_ratio": _mean(lengths)}
        done += p.count
        progress(done, total)
    report["warnings"] = warnings(report["matrices"])


def describe(predictor: Predictor, read: Callable[[int], torch.Tensor], split: Split) -> dict[str, Any]:
    """How well a predictor and the mean of the neighbours do on the held-out triples.

    Of each: `cosine` to the true matrix, `norm_ratio` to its length, `error` (squared, as a share of the true matrix's
    square; zeros have 1) as means over the triples, and `effective_rank` (exp of the entropy of the singular values as
    shares, Roy & Vetterli 2007), which the true matrix has too, on the first of them. All are 0 for a true matrix of zeros.
    """
    found: dict[str, list[dict[str, float]]] = {"predicted": [], "average": []}
    for i in split.held_out:
        below, true, above = (read(i + d).float() for d in (-1, 0, 1))
        found["predicted"].append(_compare(predictor(below, above), true))
        found["average"].append(_compare((below + above) / 2, true))
    first = split.held_out[0]
    below, true, above = (read(first + d).float() for d in (-1, 0, 1))
    ranks = {
        "predicted": effective_rank(predictor(below, above)),
        "average": effective_rank((below + above) / 2),
    }
    means = {
        name: {key: _mean([one[key] for one in rows]) for key in rows[0]} | {"effective_rank": ranks[name]}
        for name, rows in found.items()
    }
    return {
        "size": list(true.shape),
        "dropped": predictor.dropped,
        "fit": predictor.told(),
        **means,
        "true_effective_rank": effective_rank(true),
    }


def warnings(matrices: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What to say about predictions that are no better than the mean of the neighbours, one line each."""
    lines = []
    cosines = {name: (m["predicted"]["cosine"], m["average"]["cosine"]) for name, m in matrices.items()}
    if blind := [name for name, pair in cosines.items() if max(pair) < NOTHING]:
        lines.append(
            f"{', '.join(blind)}: neither the predictor nor the mean of the neighbours says anything of a held-out layer "
            f"(cosines below {NOTHING:g})"
        )
    if small := [name for name, m in matrices.items() if m["inserted_norm_ratio"] < NOTHING]:
        lines.append(
            f"{', '.join(small)}: next to nothing in the new layers (below {NOTHING:g} of the neighbours' length); little "
            "gradient will reach them"
        )
    worse = [name for name, (ours, mean) in cosines.items() if mean > ours and name not in blind]
    if worse:
        a, b = max((cosines[name] for name in worse), key=lambda pair: pair[1] - pair[0])
        lines.append(
            f"{', '.join(worse)}: the mean of the neighbours predicts held-out layers better than the predictor "
            f"(cosine {b:.2f} against {a:.2f} where the difference is largest); averaging is the better choice"
        )
    return lines


def effective_rank(w_MN: torch.Tensor) -> float:
    """exp of the entropy of the singular values as shares; 0 for a matrix of zeros."""
    w = w_MN.double() if w_MN.shape[0] <= w_MN.shape[1] else w_MN.double().T
    sigma = torch.linalg.eigvalsh(w @ w.T).clamp_min(0).sqrt()
    if not sigma.any():
        return 0.0
    share = sigma[sigma > 0] / sigma.sum()
    return float((-(share * share.log()).sum()).exp())


def _compare(made: torch.Tensor, true: torch.Tensor) -> dict[str, float]:
    a, b = float(made.double().norm()), float(true.double().norm())
    inner = float((made.double() * true.double()).sum())
    return {
        "cosine": inner / (a * b) if a and b else 0.0,
        "norm_ratio": a / b if b else 0.0,
        "error": (a * a - 2 * inner + b * b) / (b * b) if b else 0.0,
    }


def _ratio(made: torch.Tensor, *neighbours: torch.Tensor) -> float:
    near = _mean([float(w.double().norm()) for w in neighbours])
    return float(made.double().norm()) / near if near else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
