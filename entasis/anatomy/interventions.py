"""Interventions: one layer at a time is changed, and the change in loss is measured.

    @intervention("skip", kind="ablation", says="the layer is left out")
    def skip(layer: Layer) -> Change:
        return lambda x_BTD, rotation: x_BTD

The function is called for every layer and batch. It returns what stands in for the layer: a function of the residual
stream; weights by their names within the block, for those that change; or None where the layer has nothing to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from entasis.anatomy.intervals import change_by_chance, loss_change
from entasis.anatomy.layer_sweep import LayerFunction, sweep_layers
from entasis.anatomy.layer_weights import Weights, read_matrices, read_weights
from entasis.anatomy.measures import Row, measure
from entasis.anatomy.subject import Subject
from entasis.anatomy.text import TextBatch
from entasis.model.transformer import Transformer
from entasis.shape.shapes import ModelShape


@dataclass(frozen=True)
class Layer:
    """Layer `index` of the subject's model, about to read `batch`; `prepared` is what the intervention prepared."""

    subject: Subject
    index: int
    batch: TextBatch
    prepared: Any = None

    @property
    def model(self) -> Transformer:
        return self.subject.model

    @property
    def block(self) -> nn.Module:
        return self.model.blocks[self.index]

    @property
    def weights(self) -> Weights:
        return read_weights(self.model, self.index)

    @property
    def matrices(self) -> Weights:
        return read_matrices(self.model, self.index)

    def generator(self, *purpose: object) -> torch.Generator:
        """Random numbers of this layer, by the subject's seed and their purpose."""
        name, *rest = purpose
        return self.subject.generator(name, self.index, *rest)


Change = LayerFunction | Weights | None


@dataclass(frozen=True)
class Intervention:
    """A change of single layers. `prepare` is called once a sweep, `layers` are how many, from l up, it stands in for."""

    name: str
    kind: str
    change: Callable[[Layer], Change]
    prepare: Callable[[Subject], Any] | None = None
    layers: int = 1

    def sweep(self, subject: Subject, key: str | None = None) -> np.ndarray:
        """float64 [L + 1, documents]: nats under the change of each layer; see `sweep_layers`."""
        prepared = self.prepare(subject) if self.prepare else None

        def change(index: int, batch: TextBatch) -> LayerFunction | None:
            if index + self.layers > subject.n_layers:
                return None
            changed = self.change(Layer(subject, index, batch, prepared))
            if not isinstance(changed, dict):
                return changed
            return lambda x_BTD, rotation: functional_call(
                subject.model.blocks[index], changed, (x_BTD, rotation)
            )

        return sweep_layers(subject, key or self.name, change, width=self.layers)

    def measure(self, subject: Subject) -> Iterator[Row]:
        """The change in loss, in nats per token, paired over documents; of ablations also an untrained model's."""
        nats = self.sweep(subject)
        found = loss_change(nats[:-1], nats[-1], subject.text.document_tokens, seed=subject.seed)
        for layer in np.flatnonzero(~np.isnan(found.value)):
            yield found.row(int(layer), self.name, int(layer), test=True)
        if self.kind == "ablation":
            control = subject.untrained()
            nats = self.sweep(control, f"{self.name}-untrained")
            tokens = sum(len(batch.owner_N) for batch in control.batches())
            chance = change_by_chance((nats[:-1].sum(1) - nats[-1].sum()) / tokens)
            yield Row(f"{self.name}_chance", None, chance)


def intervention(
    name: str,
    *,
    kind: str,
    says: str,
    prepare: Callable[[Subject], Any] | None = None,
    layers: int = 1,
    lacks: Callable[[ModelShape], str | None] | None = None,
) -> Callable[[Callable[[Layer], Change]], Intervention]:
    """Makes an `Intervention` of a function and registers it as the measure `name`."""
    gives = {name: f"change in loss, nats per token, when {says}"}
    if kind == "ablation":
        gives[f"{name}_chance"] = "how much of that a layer of an untrained model shows by chance (5 %)"

    def add(change: Callable[[Layer], Change]) -> Intervention:
        made = Intervention(name, kind, change, prepare, layers)
        measure(name, kind=kind, gives=gives, lacks=lacks)(made.measure)
        return made

    return add
