"""An arm of a study, with its shapes solved, and what was found about it before the main runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from entasis import quantities
from entasis.report.tables import Column
from entasis.shape import cost, layout
from entasis.shape.shapes import ModelShape
from entasis.study.config import changed
from entasis.train import recipe as recipes
from entasis.train.stages import StageSpan, flops_per_token
from entasis.train.training_plans import plan as training_plans
from entasis.train.training_plans.plan import TrainingPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One arm, or trunk, with its shapes solved."""

    name: str
    recipe: dict[str, Any]
    shape: ModelShape
    """What its first stage begins with."""
    stages: list[StageSpan] = field(repr=False)
    notes: list[str]
    trunk: str | None = None
    """Whose run with the same seed its runs start from."""
    control: bool = False
    """A positive control, exempt from equal cost and from Holm."""

    @property
    def final_shape(self) -> ModelShape:
        """Of the model that is judged."""
        return self.stages[-1].shape

    @property
    def parameters(self) -> int:
        """Of the model that is judged."""
        return cost.parameters(self.final_shape)

    @property
    def active_parameters(self) -> list[int]:
        """How many learn in each stage."""
        return [stage.counts.active for stage in self.stages]

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs per token of the recipe as written: three times forward, attention over the full sequence."""
        return flops_per_token(self.stages)

    @property
    def stage_tokens(self) -> list[int]:
        """Tokens of each stage, in whole batches, as the recipe is written."""
        return [stage.steps * stage.batch_tokens for stage in self.stages]

    @property
    def disk_bytes(self) -> int:
        """Of a finished run's folder: weights and moments, which stand in every checkpoint that it keeps too."""
        last = self.stages[-1]
        memory = cost.training_memory(last.shape, last.trainable, ranks=last.ranks)
        checkpoint = recipes.Checkpoint(**(self.recipe.get("checkpoint") or {}))
        kept = 1 if checkpoint.every is None else checkpoint.keep_last
        return (1 + kept) * (memory.weights + memory.optimizer)

    def flops(self, tokens: Sequence[int]) -> int:
        """Training FLOPs of a run with so many tokens in each stage, what its plan measures included."""
        trained = sum(n * stage.flops_per_token for n, stage in zip(tokens, self.stages, strict=True))
        if (plan := self.plan) is None:
            return trained
        each = training_plans.measurement_flops(plan, self.shape, self.stages[0].data.sequence)
        return trained + round(plan.measurements * each)

    @property
    def plan(self) -> TrainingPlan | None:
        """Its training plan, if it has one."""
        wanted = self.recipe.get("training_plan")
        return None if wanted is None else training_plans.read(wanted)

    @property
    def timed(self) -> dict[str, Any]:
        """A recipe whose steps cost the same. An arm that starts from a trunk begins with initial weights instead."""
        if self.trunk is None:
            return self.recipe
        plain = changed(self.recipe, {"shape": self.stages[0].shape.to_dict()})
        del plain["start"]
        # Without what the trunk's weights brought, no layer is new: what is meant is named, and rates may be any.
        for stage, span in zip(plain.get("stages") or [], self.stages, strict=False):
            names = layout.sizes(span.shape)
            stage |= {"trainable": [name for name in span.trainable if name in names]}
            if stage.get("lora"):
                stage["lora"] = {**stage["lora"], "on": list(span.adapted)}
            for key in ("warmup_new", "anneal"):
                stage.pop(key, None)
        if plain.get("stages"):
            plain["stages"][0]["transition"] = None
        return plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was found before the main runs."""

    multiplier: dict[str, float] = field(default_factory=dict)
    tokens_per_second: dict[str, float] = field(default_factory=dict)


def active_column(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """A column of what learns in each stage, where some row's arm ever trains less than all that it ends with."""
    freezes = any(row["active_parameters"] != [row["parameters"]] for row in rows)
    return [Column("active", "active", "s", "by stage")] if freezes else []


def shown_active(counts: Sequence[int]) -> str:
    """`2.1M, 0.9M, 1.4M`: what learns in each stage; of many stages the least and the most."""

    def short(n: int) -> str:
        return f"{n / 1e6:.3g}M" if n >= 1e6 else f"{n / 1e3:.3g}k"

    if len(counts) > 4:
        return f"{short(min(counts))} to {short(max(counts))}"
    return ", ".join(short(n) for n in counts)


def batch_tokens(plain: Mapping[str, Any]) -> int:
    """Tokens of one optimizer step."""
    return quantities.count(
        (plain.get("batch") or {}).get("tokens", recipes.BatchSize().tokens), "batch.tokens"
    )
