"""What a stage reads: the corpora of its recipe, mixed, and how far each has been read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from entasis.data.corpus import Corpus
from entasis.data.dataset import TokenDataset
from entasis.data.mixture import Mixture, Part
from entasis.train.recipe import Data, mixture_of
from entasis.train.stages import StageSpan

Positions = Mapping[str, int]
"""Sequences read of each corpus at each length of sequence."""


class TrainingData:
    """The mixture of a stage that has read `done` sequences when the corpora stand at `positions`."""

    def __init__(self, data: Data, seed: int, positions: Positions, done: int = 0) -> None:
        self.paths = [part.path for part in mixture_of(data.train).values()]
        parts = [
            Part(name, TokenDataset(Corpus(part.path), data.sequence), part.weight)
            for name, part in mixture_of(data.train).items()
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
    wanted = mixture_of(data.train)
    total = sum(part.weight for part in wanted.values())
    return [
        {"name": name, "path": part.path, "share": part.weight / total, "epochs": epochs[part.path]}
        for name, part in wanted.items()
    ]


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
