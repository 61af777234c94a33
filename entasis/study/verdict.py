"""The answer of a study: every number behind it, and the sentences that follow from them. `verdict.json` holds it.

    verdict = read(Path("studies/quickstart"))
    verdict.protocols["params"].arms["crown"].difference.mean

In the file, a number that is not finite is null.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from entasis.errors import Damaged, UserError
from entasis.files import SEAL, read_json, write_json
from entasis.study.statistics import Difference
from entasis.study.stopping import Until
from entasis.study.throughput import Speed

FILE = "verdict.json"


def _numbers(value: object) -> object:
    """A mapping of numbers with NaN for null."""
    if not isinstance(value, Mapping):
        return value
    return {k: math.nan if v is None else v for k, v in value.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class LookResult:
    """What was known of a comparison after `n` seeds: alone, and together with the other comparisons."""

    n: int
    mean: float
    low: float
    high: float
    p: float
    together_low: float
    together_high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlResult:
    """Whether a positive control, an arm that must be worse, was seen to be worse."""

    seen: bool
    p_one_sided: float | None
    margins: float | None
    """Its mean difference in margins; None without a finished pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstPlan:
    """What was planned before the first run, of what may change afterwards."""

    seeds: list[int]
    arms: list[str]
    until: Until | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkCost:
    """The run that an arm's runs start from, and what it took: tokens and training FLOPs."""

    name: str
    tokens: int
    flops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmVerdict:
    """One arm under one protocol: what it is, what its finished runs took and reached, and how it compares."""

    parameters: int
    active_parameters: list[int] | None = None
    """Of each stage; None in files of earlier versions."""
    flops_per_token: int
    layers: int
    distinct_layers: int
    tokens: int | None
    """Of one run; this and what follows up to `learning_rate_multiplier` is None without a finished run."""
    trunk: TrunkCost | None = None
    training_flops: int | None
    tokens_per_second: float | None
    """Median over seeds, as `seconds` and `peak_memory_bytes`."""
    seconds: float | None
    peak_memory_bytes: float | None
    learning_rate_multiplier: float | None
    scores: dict[int, float]
    """Bits per byte by seed."""
    bits_per_byte: float | None
    """Their mean."""
    stage_scores: list[float] | None = None
    """Bits per byte after each stage, means over seeds; None for one stage, and where some were not validated."""
    training_loss: float | None = None
    """Mean over seeds of the loss in nats per token on the text that is read, in the last steps."""
    sd: float | None
    judgement: str
    """A key of `verdict_text.SHORT`."""
    says: str
    difference: Annotated[Difference, BeforeValidator(_numbers)] | None
    """To the baseline; None for the baseline, for what is the baseline itself, and without a finished pair."""
    planned_tokens: int
    differences: dict[int, float]
    """To the baseline, by seed."""
    looks: list[Annotated[LookResult, BeforeValidator(_numbers)]] | None = None
    """In a study that adds seeds until it knows."""
    throughput: Annotated[Speed, BeforeValidator(_numbers)] | None = None
    """At equal time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastVerdict:
    """How one arm compares with another that is not the baseline, as the study planned to ask."""

    arm: str
    against: str
    judgement: str
    """A key of `verdict_text.SHORT`."""
    says: str
    difference: Annotated[Difference, BeforeValidator(_numbers)] | None
    """None without a finished pair, and for two arms that are the same."""
    differences: dict[int, float]
    """By seed."""
    looks: list[Annotated[LookResult, BeforeValidator(_numbers)]] | None = None
    """In a study that adds seeds until it knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolVerdict:
    """All arms under one protocol of equal cost."""

    sentence: str
    baseline_sd: float | None
    """Over seeds; None with one."""
    paired_sd: float | None
    """Of a paired difference, pooled over arms; None with one seed."""
    arms: dict[str, ArmVerdict]
    contrasts: list[ContrastVerdict] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer of a study. What has a default is missing in files of earlier versions."""

    study: str
    title: str
    metric: str
    baseline: str
    margin: float
    seeds: list[int]
    comparisons: int = 0
    """How many are judged together (Holm)."""
    until: Until | None = None
    planned_first: FirstPlan | None = None
    """None where nothing was added after the first run."""
    controls: dict[str, ControlResult] = field(default_factory=dict)
    sentence: str
    complete: bool
    runs: int
    finished: int
    failed: dict[str, str]
    """Why, by the run's folder."""
    protocols: dict[str, ProtocolVerdict]


def plain(
    part: Verdict | ArmVerdict | ContrastVerdict | LookResult | Difference | Speed | Until,
) -> dict[str, Any]:
    """A verdict, or a part of one, as JSON has it."""
    return dataclasses.asdict(part, dict_factory=_entries)


def _entries(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in pairs
        if value is not None or key not in ("looks", "throughput")
    }


def write(folder: Path, verdict: Verdict) -> None:
    """Writes `verdict.json`, sealed, into a study's folder."""
    write_json(folder / FILE, _as_json(verdict))


def _as_json(verdict: Verdict) -> dict[str, Any]:
    """What the file says, in which keys are text."""
    told: dict[str, Any] = json.loads(json.dumps(plain(verdict), allow_nan=False))
    return told


def read(folder: Path) -> Verdict:
    """The verdict in a study's folder. Raises `UserError` where there is none, `Damaged` where it is not whole."""
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder}: has no {FILE}; run `entasis study report {folder}` first")
    content = {key: value for key, value in read_json(path).items() if key != SEAL}
    try:
        return _FORMAT.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Damaged(f"damaged: {path}: {where}: {first['msg']}") from error


def holds(folder: Path, verdict: Verdict) -> bool:
    """Whether the file is there, whole, and says this; one that is damaged is made again."""
    try:
        there = read_json(folder / FILE) if (folder / FILE).is_file() else {}
        return {key: value for key, value in there.items() if key != SEAL} == _as_json(verdict)
    except Damaged:
        return False


_FORMAT = TypeAdapter(Verdict)
