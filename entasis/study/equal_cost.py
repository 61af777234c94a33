"""How long arms are trained so that they cost the same: tokens of every stage under a protocol."""

from __future__ import annotations

from collections.abc import Mapping

from entasis.errors import UserError
from entasis.shape import cost, selectors
from entasis.study.arms import Arm, Findings, batch_tokens
from entasis.study.config import Protocol, Study
from entasis.train import recipe as recipes
from entasis.train.resolved_recipe import resolved_stages_of_plan
from entasis.train.training_plans.plan import TrainingPlan


def tokens_of(study: Study, arms: Mapping[str, Arm], arm: Arm, protocol: Protocol, findings: Findings) -> int:
    """How long an arm is trained under a protocol, in whole batches; without its trunk."""
    return sum(stage_tokens_of(study, arms, arm, protocol, findings))


def stage_tokens_of(
    study: Study, arms: Mapping[str, Arm], arm: Arm, protocol: Protocol, findings: Findings
) -> list[int]:
    """Tokens of each stage under a protocol, in whole batches: the last one is as long as makes the costs equal.

    Stages that are written as shares of the run stay these shares. What the arm's trunk costs is spent already. A control's length stays in proportion to the baseline's. Raises `UserError` where nothing would be left for the last stage.
    """
    base = arms[study.baseline]
    if arm.plan is not None:
        factor = _plan_factor(study, arms, arm, arm.plan, protocol, findings)
        return [round(n * factor) for n in arm.stage_tokens]
    *before, last = arm.stage_tokens
    batch, wanted = arm.stages[-1].batch_tokens, float(last)
    if arm.control:
        wanted *= tokens_of(study, arms, base, protocol, findings) / sum(base.stage_tokens)
    elif protocol == "flops" and arm.name != base.name:
        limit = before_run(arms, base)[1] + base.flops(base.stage_tokens)
        if _in_shares(arm):
            factor = (limit - before_run(arms, arm)[1]) / arm.flops(arm.stage_tokens)
            sizes = [stage.batch_tokens for stage in arm.stages[:-1]]
            before = [max(1, round(n * factor / b)) * b for n, b in zip(before, sizes, strict=True)]
        spent = before_run(arms, arm)[1] + arm.flops([*before, 0])
        wanted = (limit - spent) / arm.stages[-1].flops_per_token
        if wanted < batch and spent > 0:
            raise UserError(
                f"study {study.name}: arm {arm.name} cannot be matched by flops: what comes before its last stage takes "
                f"{spent:.3e} of the {limit:.3e} FLOPs that {base.name} has, which leaves less than one batch"
            )
    if protocol == "time" and not arm.control:
        wanted = _tokens_in_time(study, base, arm, findings)
    return [*before, max(1, round(wanted / batch)) * batch]


def _in_shares(arm: Arm) -> bool:
    """Whether all of an arm's stages but the last, which takes the rest, are shares of its tokens."""
    written = [stage.get("tokens") for stage in arm.recipe.get("stages") or []][:-1]
    return bool(written) and all(str(tokens).strip().endswith("%") for tokens in written)


def _tokens_in_time(study: Study, base: Arm, arm: Arm, findings: Findings) -> float:
    """How far an arm comes in the time of every run under `time`."""
    speed = findings.tokens_per_second
    seconds = sum(base.stage_tokens) / speed[base.name] if study.hours is None else study.hours * 3600
    return seconds * speed[arm.name]


def _plan_factor(
    study: Study,
    arms: Mapping[str, Arm],
    arm: Arm,
    plan: TrainingPlan,
    protocol: Protocol,
    findings: Findings,
) -> float:
    """How many times as long as its recipe says an arm with a training plan is trained, all its stages alike.

    A plan that spends FLOPs gets those of the baseline, its measurements included. Under `time` the speed is that of the
    plan's stages as they are mixed.
    """
    base = arms[study.baseline]
    if arm.control:
        return tokens_of(study, arms, base, protocol, findings) / sum(base.stage_tokens)
    if protocol == "time":
        return _tokens_in_time(study, base, arm, findings) / sum(arm.stage_tokens)
    if protocol in ("params", "unmatched"):
        return 1.0
    left = before_run(arms, base)[1] + base.flops(base.stage_tokens) - before_run(arms, arm)[1]
    if plan.spend == "flops":
        whole = cost.flops_per_token(arm.shape, arm.stages[0].data.sequence)
        return left / (arm.recipe["tokens"] * whole)
    return left / arm.flops(arm.stage_tokens)


def before_run(arms: Mapping[str, Arm], arm: Arm) -> tuple[int, int]:
    """(tokens, FLOPs) of the trunks that a run of this arm starts from, all of them."""
    trunks = _trunks(arms, arm)
    return sum(sum(t.stage_tokens) for t in trunks), sum(t.flops(t.stage_tokens) for t in trunks)


def _trunks(arms: Mapping[str, Arm], arm: Arm) -> list[Arm]:
    """The trunk that an arm starts from, the one that this starts from, and so on."""
    found = []
    while arm.trunk is not None:
        arm = arms[arm.trunk]
        found.append(arm)
    return found


def check_length(study: Study, arms: Mapping[str, Arm], arm: Arm) -> None:
    """Refuses arms whose length cannot be what a protocol asks for. Raises `UserError`."""
    where, base = f"study {study.name}: arm {arm.name}", arms[study.baseline]
    for protocol in study.protocols:
        if protocol == "unmatched":
            continue
        if protocol == "params":
            own, others = (before_run(arms, a)[0] + sum(a.stage_tokens) for a in (arm, base))
            if own != others:
                trunk = ", its trunk's with them," if arm.trunk or base.trunk else ""
                raise UserError(
                    f"{where} trains on {own:,} tokens{trunk} in batches of {batch_tokens(arm.recipe):,}, {base.name} on "
                    f"{others:,} in batches of {batch_tokens(base.recipe):,}; params compares at equal parameters and "
                    "tokens: give both the same"
                )
            continue
        if arm.name != base.name and "tokens" in study.arms[arm.name]:
            raise UserError(
                f"{where} sets tokens, but under {protocol} its length follows from {base.name}'s; leave it out"
            )
        if protocol == "flops":
            _check_cost_is_known(study, arms, arm)
            stage_tokens_of(study, arms, arm, protocol, Findings())
        elif arm.plan is not None and arm.plan.measurement is not None:
            raise UserError(
                f"{where}: its training plan goes by what it measures as it trains, so how fast it will be is not known "
                f"beforehand, as {protocol} needs; use flops, or give it numbers"
            )
        elif arm.plan is not None and _draws(study, arm):
            raise UserError(
                f"{where}: its training plan draws layers so that seeds differ in cost, and {protocol} knows one speed of an "
                "arm; use flops, or leave embedding in always"
            )
        elif arm.plan is None and (
            len(arm.stages) > 1 or any(stage.get("tokens") for stage in arm.recipe.get("stages") or [])
        ):
            raise UserError(
                f"{where} sets the tokens of its stages, but under {protocol} the length follows from "
                f"{base.name}'s; use params or flops"
            )
        elif arm.trunk != base.trunk:
            raise UserError(
                f"{where} and {base.name} do not start from the same trunk, whose time under {protocol} is not known; "
                "use params or flops"
            )


def _check_cost_is_known(study: Study, arms: Mapping[str, Arm], arm: Arm) -> None:
    """Refuses plans whose cost is not known beforehand: those that spend tokens and measure or draw what learns.

    A trunk that the arm shares with the baseline may have one, as its cost does not differ. Raises `UserError`.
    """
    own, others = ({trunk.name for trunk in _trunks(arms, a)} for a in (arm, arms[study.baseline]))
    for one in (arm, *(arms[name] for name in sorted(own ^ others))):
        plan = one.plan
        if plan is None or plan.spend == "flops":
            continue
        if plan.measurement is not None or _draws(study, one):
            raise UserError(
                f"study {study.name}: {'arm' if one is arm else 'trunk'} {one.name}: its training plan measures or draws "
                "which layers learn, so what its tokens cost is not known beforehand, as flops needs; write spend: flops "
                "in the plan"
            )


def _draws(study: Study, arm: Arm) -> bool:
    """Whether a token of the arm's plan costs something else under another seed."""
    recipe, sequence, prices = recipes.from_dict(arm.recipe), arm.stages[0].data.sequence, set()
    assert recipe.training_plan is not None
    # Where FLOPs are spent the total is the budget's, but for rounding.
    recipe = recipe.replaced(
        training_plan={k: {**(v or {}), "spend": "tokens"} for k, v in recipe.training_plan.items()}
    )
    for seed in study.seeds:
        stages = resolved_stages_of_plan(recipe.replaced(seed=seed), arm.shape, ())
        learning = [selectors.select(arm.shape, stage.trainable) for stage in stages]
        costs = [cost.stage_flops_per_token(arm.shape, names, sequence) for names in learning]
        prices.add(sum(stage.tokens * price for stage, price in zip(stages, costs, strict=True)))
    return len(prices) > 1
