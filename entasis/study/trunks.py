"""Trunks: runs that arms start from. A trunk is trained once a seed, before them, and is not judged itself.

base: {…, tokens: 1M}
trunks:
  small: {tokens: 2M}                                   # changes to the base, as an arm's
arms:
  plain: {start: {from: {trunk: small}}}                # the small model trained on
  grown: {start: {from: {trunk: small}}, stages: [{tokens: 1M, transition: {resize: {…}}}]}
  scratch: {tokens: 3M}

Every arm's run starts from the trunk's run with its own seed. What a trunk costs counts as cost of the arms that start
from it; among arms of one trunk it does not differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from entasis.errors import UserError
from entasis.registry import advise

if TYPE_CHECKING:
    from entasis.study.plan import PlannedRun


def named_in(recipe: Mapping[str, Any]) -> str | None:
    """The trunk that a recipe's `start` names; None where it names none. Raises `UserError`."""
    start = recipe.get("start")
    source = start.get("from") if isinstance(start, Mapping) else None
    if not isinstance(source, Mapping):
        return None
    if set(source) != {"trunk"} or not isinstance(source["trunk"], str):
        raise UserError(f"start.from is {dict(source)!r}; write a folder, or {{trunk: NAME}}")
    return source["trunk"]


def folder_of(name: str, seed: int | None = None) -> str:
    """Where a trunk's runs lie in the study's folder."""
    return f"trunks/{name}" if seed is None else f"trunks/{name}/seed-{seed}"


def without_trunk(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A trunk's own base: the study's, but that it starts from no trunk unless its changes say so."""
    return {k: v for k, v in recipe.items() if k != "start" or named_in(recipe) is None}


def check(trunks: Sequence[str], starts: Mapping[str, str | None]) -> None:
    """Refuses trunks that are not known, that start from one below them, or that nothing starts from.

    `starts` says of each arm and trunk which trunk it starts from. Raises `UserError`.
    """
    for name, start in starts.items():
        known = trunks[: trunks.index(name)] if name in trunks else trunks
        if start is not None and start not in known:
            advice = advise(start, known) if known else "the study has no trunk above it"
            raise UserError(f"{name} starts from the trunk {start!r}, which is not known; {advice}")
    if idle := [name for name in trunks if name not in starts.values()]:
        raise UserError(
            f"nothing starts from the trunk {idle[0]}; write start: {{from: {{trunk: {idle[0]}}}}} in an arm"
        )


def needed(runs: Iterable[PlannedRun]) -> list[PlannedRun]:
    """The trunks' runs that these runs start from, once each, in the order in which they are to be trained."""
    found: dict[str, PlannedRun] = {}
    for run in runs:
        chain = []
        while (run := run.needs) is not None:  # type: ignore[assignment]
            chain.append(run)
        found |= {r.folder: r for r in reversed(chain)}
    return list(found.values())
