"""What a stage reads: the corpora of its recipe, mixed, and how far each has been read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from entasis.data import mixture_rules
from entasis.data.corpus import Corpus
from entasis.data.dataset import TokenDataset
from entasis.data.mixture import Mixture, Part
from entasis.train.recipe import Data, Recipe, StageData, WeightedCorpus, mixture_of
from entasis.train.stages import StageSpan

Positions = Mapping[str, int]
"""Sequences read of each corpus at each length of sequence."""


D = TypeVar("D", Data, StageData)


def weighed(recipe: Recipe, beside: Path = Path()) -> Recipe:
    """The recipe with numbers in place of rules for the weights of its corpora. Raises `UserError` where one is missing.

    `beside` is what paths are relative to.
    """

    def numbers(data: D) -> D:
        if data.weights is None:
            return data
        corpora = mixture_of(data.train)
        rule = mixture_rules.read(data.weights, "recipe: data.weights")
        found = mixture_rules.shares(rule, [Corpus(beside / part.path).tokens for part in corpora.values()])
        train = {
            name: part.replaced(weight=share)
            for (name, part), share in zip(corpora.items(), found, strict=True)
        }
        return data.replaced(train=train, weights=None)

    stages = tuple(s.replaced(data=numbers(s.data)) if s.data else s for s in recipe.stages)
    return recipe.replaced(data=numbers(recipe.data), stages=stages)


class TrainingData:
    """The mixture of a stage that has read `done` sequences when the corpora stand at `positions`."""

    def __init__(self, data: Data, seed: int, positions: Positions, done: int = 0) -> None:
        self.paths = [part.path for part in mixture_of(data.train).values()]
        parts = [
            Part(name, TokenDataset(Corpus(part.path), data.sequence), weight)
            for (name, part), weight in zip(
                mixture_of(data.train).items(), weights_of(data.train), strict=True
            )
        ]
        self.mixture = Mixture(parts, seed)
        self.places = [f"{part.dataset.corpus.fingerprint}/{data.sequence}" for part in parts]
        """What each corpus's position is kept under."""
        counts = self.mixture.counts(done)
        self.mixture.begins = [positions.get(p, 0) - n for p, n in zip(self.places, counts, strict=True)]

    def positions(self, done: int) -> dict[str, int]:
        """How far its corpora have been read when the stage has read `done` sequences."""
        counts = self.mixture.counts(done)
        return {p: b + n for p, b, n in zip(self.places, self.mixture.begins, counts, strict=True)}


def describe_data(data: Data, epochs: Mapping[str, float]) -> list[dict[str, Any]]:
    """Name, path, share and epochs (see `planned_epochs`) of each corpus of a stage."""
    weights = weights_of(data.train)
    return [
        {"name": name, "path": part.path, "share": weight / sum(weights), "epochs": epochs[part.path]}
        for (name, part), weight in zip(mixture_of(data.train).items(), weights, strict=True)
    ]


def weights_of(text: str | Mapping[str, WeightedCorpus]) -> list[float]:
    """The weights of the corpora in `data.train`, which are numbers by now: see `weighed`."""
    weights = [part.weight for part in mixture_of(text).values()]
    assert all(weight is not None for weight in weights)
    return [weight for weight in weights if weight is not None]


def planned_epochs(
    spans: Sequence[StageSpan], seed: int, positions: Positions, step: int
) -> dict[str, float]:
    """How often each corpus will have been read at the end of a run that is at `step`, by its path."""
    positions = dict(positions)
    epochs: dict[str, dict[str, float]] = {}
    for span in spans:
        done = min(max(0, step - span.start), span.steps) * span.sequences
        data = TrainingData(span.data, seed, positions, done)
        positions.update(data.positions(span.steps * span.sequences))
        for path, place, part in zip(data.paths, data.places, data.mixture.parts, strict=True):
            epochs.setdefault(path, {})[place] = positions[place] / len(part.dataset)
    return {path: sum(at_each_length.values()) for path, at_each_length in epochs.items()}
