"""Training plans: which layers learn in which stretch of a run. One registered class each, in a file of its own here.

    training_plan: {importance_groups: {importance: [0.3, 2.1, 0.7, 0.2], groups: 2}}
    training_plan: {lisa: {layers: 2, every: 5%, spend: flops}}
    training_plan: {importance_groups: {importance: {measure: gradient, after: 10%}}}

A plan stands in a recipe instead of `stages:` and says shares, not tokens: it becomes stages once the model and the steps
of the run are known. Its fields are its options, the first line of its docstring its rule in docs/budgets.md. All stages of
a plan keep the optimizer's moments and share one learning-rate schedule. A plan that measures the importance of layers as it goes is known up to its next measurement only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from entasis.configuration import HERE, Count, Settings, Share, parse
from entasis.errors import UserError
from entasis.files import read_json
from entasis.registry import Registry, advise
from entasis.shape import cost, layout, selectors
from entasis.shape.shapes import ModelShape

Measured = Sequence[Sequence[float]]
"""One number for each layer of every measurement that a plan has made so far."""


@dataclass(frozen=True)
class Anneal:
    """The learning rate of some parameters is ½ · scale · (1 + cos(π · u / end)) of the run's after the share u of it."""

    on: Sequence[str]
    end: float
    scale: float = 1.0


@dataclass(frozen=True)
class Phase:
    """A stretch of a plan: which layers learn in it, and for how long."""

    layers: tuple[int, ...]
    share: float
    """Of the run's steps, or of its FLOPs."""
    everything: bool = False
    """Whatever is not frozen by the model's shape learns, also what belongs to no layer."""
    transition: Mapping[str, Any] | None = None
    anneal: tuple[Anneal, ...] = ()
    """Rates that fall to zero, for some of what learns in it."""


class Measurement(Settings):
    """Importance of layers measured on training text, by `entasis.grow.layer_importance`."""

    measure: Literal["gradient", "skip"] = "gradient"
    tokens: Count = 16_384
    """How much of the text is read for it, in whole sequences; what comes next in the data, which is read again after."""
    after: Annotated[Share, Field(gt=0, lt=1)] = 0.1
    """Share of the run before it, in which everything learns."""


class TrainingPlan(Settings):
    """One way to spend a run on its layers."""

    always: list[str] = Field(default_factory=lambda: ["embedding", "final_norm", "head"])
    """Selectors of what learns in every stretch besides the layers. Without `embedding` the backward pass ends below the
    lowest layer that learns, and costs less."""
    spend: Literal["tokens", "flops"] = "tokens"
    """`tokens`: the recipe's tokens, whatever they cost; shares are of steps. `flops`: as many FLOPs as training everything on
    the recipe's tokens would take, measurements included; shares are of FLOPs, and the plan sees more tokens."""

    def is_default(self, name: str) -> bool:
        """Whether an option is what it is when nobody says it; in a resolved recipe all of them are written down."""
        return getattr(self, name) == type(self).model_fields[name].get_default(call_default_factory=True)

    @property
    def measurement(self) -> Measurement | None:
        """What the plan measures as it goes."""
        return None

    @property
    def measurements(self) -> int:
        """How many times it does."""
        return 0 if self.measurement is None else 1

    def alike(self, n_layers: int) -> list[list[float]]:
        """What it would measure if all layers turned out alike."""
        return [[1.0] * n_layers] * self.measurements

    def phases(self, n_layers: int, steps: int, seed: int, measured: Measured = ()) -> list[Phase]:
        """The stretches in order, up to the next measurement; with all of them their shares add up to 1.

        Raises `UserError`.
        """
        raise AssertionError("each plan has its own")


class ImportancePlan(TrainingPlan):
    """A plan that follows one number for each layer, larger where the layer matters more."""

    importance: list[float] | Measurement
    """The numbers; the JSON file that `entasis anatomy --suggest importance` wrote them to; or how to measure them."""
    spread: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """The least important layer counts 1 - spread, the most important 1 + spread, the others linearly between
    (the map of AlphaPruning, 2410.10912)."""
    shuffle: Annotated[int, Field(ge=0)] | None = None
    """A control: the numbers are shuffled over the layers by this number and the run's seed."""

    @field_validator("importance", mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        """By what it is written as, so that a mistake is told as one of that kind."""
        if isinstance(value, Mapping):
            return parse(Measurement, value, HERE)
        return read_importance(value) if isinstance(value, str) else value

    @property
    def measurement(self) -> Measurement | None:
        return self.importance if isinstance(self.importance, Measurement) else None

    def phases(self, n_layers: int, steps: int, seed: int, measured: Measured = ()) -> list[Phase]:
        if self.measurement is None:
            assert isinstance(self.importance, list)
            return self.spread_over(self._count(self.importance, n_layers, seed), steps, seed)
        first = Phase((), self.measurement.after, everything=True)
        if not measured:
            # What does not depend on the numbers is checked before anything is trained.
            self.spread_over([1.0] * n_layers, steps, seed)
            return [first]
        rest = self.spread_over(
            self._count(measured[0], n_layers, seed), round((1 - first.share) * steps), seed
        )
        return [first, *(replace(phase, share=phase.share * (1 - first.share)) for phase in rest)]

    def spread_over(self, counts: Sequence[float], steps: int, seed: int) -> list[Phase]:
        """The stretches, by what each layer counts (mean 1 where all are alike). Raises `UserError`."""
        raise AssertionError("each plan has its own")

    def _count(self, importance: Sequence[float], n_layers: int, seed: int) -> list[float]:
        """What each layer counts, from 1 - spread to 1 + spread. Raises `UserError` for another number of layers."""
        values = list(importance)
        if len(values) != n_layers:
            raise UserError(
                f"recipe: training_plan: importance has {len(values)} numbers; the model has {n_layers} layers"
            )
        if self.shuffle is not None:
            random.Random(f"{self.shuffle}/{seed}").shuffle(values)
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
    for i, value in enumerate(found["importance"]):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(
                f"{HERE} is {path!r}, whose importance[{i}] is {value!r}; it must be a finite number"
            )
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


def lay_out(
    plan: TrainingPlan,
    shape: ModelShape,
    *,
    steps: int,
    batch_tokens: int,
    sequence: int,
    seed: int,
    measured: Measured = (),
) -> list[dict[str, Any]]:
    """The plan as a recipe's stages, up to its next measurement; stretches that get no step are left out.

    `steps` are those that the recipe's tokens make. Raises `UserError`.
    """
    whole = steps * batch_tokens * cost.flops_per_token(shape, sequence)
    budget = whole - plan.measurements * measurement_flops(plan, shape, sequence)
    if budget < whole / 2:
        raise UserError(
            "recipe: training_plan: its measurements take more than half of the run's FLOPs; read fewer tokens"
        )
    learns = {p.part for p in layout.parameters(shape) if not p.frozen}

    def present(terms: Sequence[str]) -> list[str]:
        """Without the embedding where it is a frozen interface, which has nothing that could learn."""
        return [term for term in terms if term != "embedding" or term in learns]

    always = present(plan.always)
    # Also where everything learns until a measurement. What is newest is known to the run alone.
    if known := [term for term in always if "newest" not in term]:
        selectors.select(shape, known, where="recipe: training_plan: always")
    if plan.spend == "flops" and len(known) < len(always):
        raise UserError(
            "recipe: training_plan: always has newest, whose cost is known to the run alone; name the layers, or spend tokens"
        )
    result: list[dict[str, Any]] = []
    transition: Mapping[str, Any] | None = None
    done = share = 0.0
    for phase in plan.phases(shape.n_layers, steps, seed, measured):
        layers = [f"blocks[{','.join(map(str, phase.layers))}]"] if phase.layers else []
        trainable = "all" if phase.everything else [*always, *layers]
        if not trainable:
            raise UserError(
                "recipe: training_plan: always is empty, and in one stretch no layer learns either"
            )
        each, end = 1.0, float(steps)
        if plan.spend == "flops":
            names = selectors.select(shape, trainable, where="recipe: training_plan: always")
            each, end = batch_tokens * cost.stage_flops_per_token(shape, names, sequence), budget
        share += phase.share
        # That of a stretch without a step is made before the next.
        transition = phase.transition or transition
        length = max(0, round((share * end - done) / each))
        if not length:
            continue
        start, done = done, done + length * each
        rates = [
            {"on": present(a.on), "part": [start / end / a.end, done / end / a.end], "scale": a.scale}
            for a in phase.anneal
            if present(a.on)
        ]
        result.append(
            {
                "trainable": trainable,
                "tokens": length * batch_tokens,
                "optimizer_state": "keep" if result else "reset",
                "transition": transition,
                "schedule_part": [start / end, min(1.0, done / end)],
                "anneal": rates,
            }
        )
        transition = None
    if not result:
        raise UserError(
            f"recipe: training_plan: none of {steps} steps falls on its first stretch; train longer, or plan fewer stretches"
        )
    return result


def measurement_flops(plan: TrainingPlan, shape: ModelShape, sequence: int) -> float:
    """What one measurement of the plan takes; 0 for a plan that makes none."""
    if (wanted := plan.measurement) is None:
        return 0.0
    from entasis.grow import layer_importance  # needs torch

    return (
        sequences_read(wanted, sequence)
        * sequence
        * layer_importance.flops_per_token(wanted.measure, shape, sequence)
    )


def sequences_read(wanted: Measurement, sequence: int) -> int:
    """Sequences of one measurement, at least one."""
    return max(1, wanted.tokens // sequence)
