"""Training plans: which layers learn in which stretch of a run. One registered class each.

    training_plan: {importance_groups: {importance: [0.3, 2.1, 0.7, 0.2], groups: 2}}
    training_plan: {lisa: {layers: 2, every: 5%}}

A plan stands in a recipe instead of `stages:` and says shares, not tokens: it becomes stages once the model's depth and
the steps of the run are known. Its fields are its options. All stages of a plan keep the optimizer's moments and share one
learning-rate schedule, which runs on spent FLOPs.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from entasis import quantities
from entasis.configuration import HERE, Settings, Steps, parse
from entasis.errors import UserError
from entasis.files import read_json
from entasis.registry import Registry, advise

Share = Annotated[float, Field(ge=0, le=1)]
Layer = Annotated[int, Field(ge=0, lt=1000)]


@dataclass(frozen=True)
class Phase:
    """A stretch of a plan: which layers learn in it, and for how long."""

    layers: tuple[int, ...]
    share: float
    """Of the run's steps."""
    everything: bool = False
    """Whatever is not frozen by the model's shape learns, also what belongs to no layer."""
    transition: Mapping[str, Any] | None = None


class TrainingPlan(Settings):
    """One way to spend the steps of a run on its layers."""

    always: list[str] = Field(default_factory=lambda: ["embedding", "final_norm", "head"])
    """Selectors of what learns in every stretch besides the layers. Without `embedding` the backward pass ends below the
    lowest layer that learns, and costs less."""

    def phases(self, n_layers: int, steps: int, seed: int) -> list[Phase]:
        """The stretches in order, their shares adding up to 1. Raises `UserError`."""
        raise AssertionError("each plan has its own")


class ImportancePlan(TrainingPlan):
    """A plan that follows one number for each layer, larger where the layer matters more."""

    importance: list[float]
    """The numbers, or the JSON file that `entasis anatomy --importance-file` wrote them to."""
    spread: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """The least important layer counts 1 - spread, the most important 1 + spread, the others linearly between
    (the map of AlphaPruning, 2410.10912)."""
    shuffle: Annotated[int, Field(ge=0)] | None = None
    """A control: the numbers are shuffled over the layers by this seed."""

    @field_validator("importance", mode="before")
    @classmethod
    def _read_file(cls, value: object) -> object:
        return read_importance(value) if isinstance(value, str) else value

    def weights(self, n_layers: int) -> list[float]:
        """What each layer counts, from 1 - spread to 1 + spread. Raises `UserError` for another number of layers."""
        values = list(self.importance)
        if len(values) != n_layers:
            raise UserError(
                f"recipe: training_plan: importance has {len(values)} numbers; the model has {n_layers} layers"
            )
        if self.shuffle is not None:
            random.Random(self.shuffle).shuffle(values)
        low, width = min(values), max(values) - min(values)
        return [1 + self.spread * (2 * (v - low) / width - 1) if width else 1.0 for v in values]


def read_importance(path: str) -> list[float]:
    """The numbers in `{"importance": […]}`. Raises `UserError`, in which the field's place stands for `HERE`."""
    try:
        found = read_json(Path(path))
    except OSError as error:
        raise UserError(f"{HERE} is {path!r}, which cannot be read: {error.strerror}") from error
    if not isinstance(found, dict) or not isinstance(found.get("importance"), list):
        raise UserError(f'{HERE} is {path!r}, which holds no {{"importance": [a number for each layer]}}')
    return found["importance"]


TRAINING_PLANS: Registry[type[TrainingPlan]] = Registry("training plan")


def read(source: Mapping[str, Any]) -> TrainingPlan:
    """The plan in `{NAME: {option: value, …}}`. Raises `UserError`."""
    where = "recipe: training_plan"
    if len(source) != 1:
        raise UserError(f"{where} is {dict(source)!r}; name one of {', '.join(TRAINING_PLANS)}")
    name, options = next(iter(source.items()))
    if name not in TRAINING_PLANS:
        raise UserError(f"{where}: {name!r} is not known; {advise(name, TRAINING_PLANS)}")
    return parse(TRAINING_PLANS[name], options or {}, f"{where}.{name}")


@TRAINING_PLANS.register("importance_groups")
class ImportanceGroups(ImportancePlan):
    """Layers by importance in groups of equal size, the most important group first; then all of them.

    A group's share of the steps follows the mean of what its layers count.
    """

    groups: Annotated[int, Field(ge=1, le=1000)] = 3
    final: Share = 0.4
    """Share of the steps at the end in which everything learns."""

    def phases(self, n_layers: int, steps: int, seed: int) -> list[Phase]:
        counts = self.weights(n_layers)
        if self.groups > n_layers:
            raise UserError(
                f"recipe: training_plan: groups is {self.groups}; the model has {n_layers} layers"
            )
        order = sorted(range(n_layers), key=lambda i: -counts[i])
        size, more = divmod(n_layers, self.groups)
        bounds = list(itertools.accumulate((size + (g < more) for g in range(self.groups)), initial=0))
        groups = [sorted(order[a:b]) for a, b in itertools.pairwise(bounds)]
        means = [sum(counts[i] for i in group) / len(group) for group in groups]
        stretches = [
            Phase(tuple(group), (1 - self.final) * mean / sum(means))
            for group, mean in zip(groups, means, strict=True)
        ]
        return [*stretches, Phase((), self.final, everything=True)]


@TRAINING_PLANS.register("growth_transformer")
class GrowthTransformer(TrainingPlan):
    """Growth Transformer Training (2603.19348): six phases, each of some layers, the budget by their importance.

    The paper's phases for 12 layers are the defaults: a first core (layers 4, 5; 30 epochs), early layers (1, 2; 20), a
    second core (8, 9; 20), growth (7 to 10), redundant layers scaled by 0.9, maturation of everything (15). It leaves
    open how long growth and redundant layers train, whether positions count from 0, which layers are redundant, and
    whether embedding and head learn in every phase. Our reading: 20 and 15 epochs, from 0, those that no other phase
    names, and `always`. "Epochs" are relative: they are shares of the steps.
    """

    first_core: list[Layer] = Field(default_factory=lambda: [4, 5])
    early: list[Layer] = Field(default_factory=lambda: [1, 2])
    second_core: list[Layer] = Field(default_factory=lambda: [8, 9])
    growth: list[Layer] = Field(default_factory=lambda: [7, 8, 9, 10])
    redundant: list[Layer] | None = None
    """Null: every layer that no other phase names."""
    left_out: list[Layer] = Field(default_factory=list)
    """Layers that learn in the last phase only ("anti-layers")."""
    redundant_scale: Annotated[float, Field(gt=0, le=10)] = 0.9
    epochs: list[Annotated[float, Field(ge=0)]] = Field(
        default_factory=lambda: [30.0, 20.0, 20.0, 20.0, 15.0, 15.0], min_length=6, max_length=6
    )
    shuffle: Annotated[int, Field(ge=0)] | None = None
    """A control: the positions are shuffled by this seed."""

    def phases(self, n_layers: int, steps: int, seed: int) -> list[Phase]:
        named = [self.first_core, self.early, self.second_core, self.growth]
        taken = set().union(*named, self.left_out)
        rest = [i for i in range(n_layers) if i not in taken] if self.redundant is None else self.redundant
        for layer in (*taken, *rest):
            if layer >= n_layers:
                raise UserError(
                    f"recipe: training_plan: there is no layer {layer}; the model's are 0 to {n_layers - 1}"
                )
        places = list(range(n_layers))
        if self.shuffle is not None:
            random.Random(self.shuffle).shuffle(places)
        total = sum(self.epochs)
        if not total:
            raise UserError("recipe: training_plan: epochs are all 0; nothing would be trained")
        result = []
        for group, epochs in zip([*named, rest], self.epochs, strict=False):
            layers = tuple(sorted(places[i] for i in group))
            scaled = {"layers": list(layers), "factor": self.redundant_scale}
            transition = {"scale": scaled} if group is rest and self.redundant_scale != 1 else None
            if layers and epochs:
                result.append(Phase(layers, epochs / total, transition=transition))
        result.append(Phase((), self.epochs[-1] / total, everything=True))
        missing = 1 - sum(phase.share for phase in result)
        return [*result[:-1], Phase((), result[-1].share + missing, everything=True)]


@TRAINING_PLANS.register("lisa")
class Lisa(ImportancePlan):
    """LISA (2403.17919): a few layers at a time, drawn anew every period; the layers' odds follow their importance.

    Embedding, final norm and head learn throughout, as in the paper. Without `importance` all layers are as likely, as
    there. Moments of layers that rest are kept, where the paper drops them.
    """

    importance: list[float] | None = None  # type: ignore[assignment]
    """Null: all layers alike."""
    layers: Annotated[int, Field(ge=1, le=1000)] = 2
    """How many learn at a time."""
    every: Steps = "5%"
    """Length of a period."""

    def phases(self, n_layers: int, steps: int, seed: int) -> list[Phase]:
        odds = [1.0] * n_layers if self.importance is None else self.weights(n_layers)
        if self.layers > n_layers:
            raise UserError(
                f"recipe: training_plan: layers is {self.layers}; the model has {n_layers} layers"
            )
        period = max(1, quantities.steps(self.every, steps, "recipe: training_plan: every"))
        draw = random.Random(f"lisa/{seed}")
        lengths = [min(period, steps - start) for start in range(0, steps, period)]
        return [Phase(_draw(odds, self.layers, draw), length / steps) for length in lengths]


@TRAINING_PLANS.register("freezeout")
class FreezeOut(TrainingPlan):
    """FreezeOut (1706.04983): layers stop learning from the bottom up, layer i of L after the share
    (t0 + (1 - t0) · i / L)³ of the steps (without the cube where `cubed` is false); what is above the layers learns to the
    end, the embedding as long as layer 0.

    The paper lets each layer's rate fall to zero by a cosine of its own until it is frozen, and scales the rates so that
    their integrals are equal; here all learn at the run's rate.
    """

    always: list[str] = Field(default_factory=lambda: ["final_norm", "head"])
    t0: Share = 0.5
    cubed: bool = True

    def phases(self, n_layers: int, steps: int, seed: int) -> list[Phase]:
        ends = [(self.t0 + (1 - self.t0) * i / n_layers) ** (3 if self.cubed else 1) for i in range(n_layers)]
        result, start = [], 0.0
        for i, end in enumerate(ends):
            if end > start:
                layers = tuple(range(i, n_layers))
                result.append(Phase(layers, end - start, everything=i == 0))
                start = end
        return [*result, Phase((), 1 - start)]


def _draw(odds: Sequence[float], n: int, draw: random.Random) -> tuple[int, ...]:
    """`n` different positions, one after another with odds proportional to `odds`."""
    left = dict(enumerate(odds))
    chosen = []
    for _ in range(n):
        (layer,) = draw.choices(list(left), weights=list(left.values()))
        chosen.append(layer)
        del left[layer]
    return tuple(sorted(chosen))


def allot(shares: Iterable[float], steps: int) -> list[int]:
    """Whole numbers of steps that add up to `steps`, each within one of its share of them; shares add up to 1."""
    ends = [round(part * steps) for part in itertools.accumulate(shares)]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


def to_stages(
    plan: TrainingPlan, n_layers: int, steps: int, batch_tokens: int, seed: int
) -> list[dict[str, Any]]:
    """The plan as a recipe's stages. Stretches that get no step are left out; neighbours that train the same are one.

    Raises `UserError`.
    """
    phases = plan.phases(n_layers, steps, seed)
    result: list[dict[str, Any]] = []
    for phase, length in zip(phases, allot((p.share for p in phases), steps), strict=True):
        if not length:
            continue
        layers = [f"blocks[{','.join(map(str, phase.layers))}]"] if phase.layers else []
        trainable = "all" if phase.everything else [*plan.always, *layers]
        if result and result[-1]["trainable"] == trainable and phase.transition is None:
            result[-1]["tokens"] += length * batch_tokens
            continue
        result.append(
            {
                "trainable": trainable,
                "tokens": length * batch_tokens,
                "optimizer_state": "keep" if result else "reset",
                "transition": phase.transition,
            }
        )
    return result
