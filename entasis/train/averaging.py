"""Averages of the weights along a stage. They are what is validated, and what a finished run saves.

`ema`: after every step a ← decay · a + (1 − decay) · w. It begins as the weights after the stage's first step.
`last`: the mean of the weights after the last so many multiples of `every`, counted back from the stage's last step.

Training never sees them. Parameters that do not learn are what they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from entasis.train import sharding
from entasis.train.resolved_recipe import ResolvedAverage


class WeightAverage:
    """The average of some parameters over the steps of a stage."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], how: ResolvedAverage, *, stop: int) -> None:
        """`stop` is the stage's last step, counted from the start of the run."""
        self.how, self.stop = how, stop
        self._weights = dict(parameters)
        self._means = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self._count = torch.zeros((), dtype=torch.int64)

    @property
    def count(self) -> int:
        """How many steps' weights are in it."""
        return int(self._count)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after `step`, where they count."""
        if self.how.last is not None:
            back, rest = divmod(self.stop - step, self.how.every)
            if rest or back >= self.how.last:
                return
        self._count += 1
        begins = self.how.ema is None or self.count == 1
        share = 1 / self.count if begins else 1 - (self.how.ema or 0.0)
        means, weights = ([sharding.local(x) for x in d.values()] for d in (self._means, self._weights))
        torch._foreach_lerp_(means, weights, share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model's parameters hold the average, as soon as there is one."""
        if self.count:
            self._swap()
        try:
            yield
        finally:
            if self.count:
                self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self._weights.items():
            weight, mean = sharding.local(p), sharding.local(self._means[name])
            kept = weight.clone()
            weight.copy_(mean)
            mean.copy_(kept)

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors themselves, for a checkpoint to hold and to be read into."""
        return {**self._means, "count": self._count}
