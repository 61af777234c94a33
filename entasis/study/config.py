"""What a study file says: base recipe, arms, seeds, protocol of equal cost, learning-rate treatment, margin.

base:                        # a recipe, see entasis.train.recipe
  shape: {profile: isotropic, budget: 1M, layers: 8, d_model: 128, head_dim: 32}
  data: {train: corpora/code/train, validation: corpora/code/validation, sequence: 256}
  tokens: 2M
corpora:                     # made in the study's folder, before anything runs
  code: {sources: [stdlib], train_tokenizer: 4096}
arms:                        # named changes to the base
  isotropic: {}
  crown: {shape.profile: crown}
seeds: 5
baseline: isotropic
protocols: [params]
margin: 0.01
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator

from entasis import quantities
from entasis.configuration import HERE, Count, Settings, Share, parse
from entasis.errors import UserError
from entasis.registry import advise
from entasis.study import trunks
from entasis.study.planned_looks import Spending
from entasis.study.stopping import Method, Until

Protocol = Literal["params", "flops", "time", "unmatched"]
_MOST_SEEDS = 10_000
_SWEEP_SEEDS = 1000
"""Where the sweep's seeds begin, so that a study may be given more seeds."""


def _seeds(value: Any) -> list[int]:
    """How many (5: 0 to 4), or which."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST_SEEDS:
        return list(range(value))
    valid = isinstance(value, list) and value and all(isinstance(s, int) and 0 <= s < 2**63 for s in value)
    if not valid or len(set(value)) != len(value):
        raise UserError(f"{HERE} is {value!r}; give how many (5) or a list of different ones ([0, 1, 2])")
    return list(value)


def _protocols(value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names:
        raise UserError(f"{HERE} is {value!r}; list one or more of {', '.join(get_args(Protocol))}")
    for name in names:
        if name not in get_args(Protocol):
            raise UserError(f"{HERE} holds {name!r}; use {', '.join(get_args(Protocol))}")
    return list(dict.fromkeys(names))


def _named(value: Any) -> Any:
    """Names may be numbers, and what they name may be left empty."""
    if not isinstance(value, Mapping):
        return value
    return {str(name): {} if content is None else content for name, content in value.items()}


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Seeds = Annotated[list[int], BeforeValidator(_seeds)]
Size = Annotated[float, Field(gt=0, lt=1e9)]
Changes = Annotated[dict[str, dict[str, Any]], BeforeValidator(_named)]
"""Named changes to the base, by dot-keys."""


class Sweep(Settings):
    """Learning rates tried for every arm before the study proper, each as a multiple of the base recipe's."""

    multipliers: list[Size]
    seeds: Seeds = Field(default=1, validate_default=True)
    """None of them the study's; how many is taken from a number where no study's can be expected."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """The stated small size: dot-keys changed in the recipe for the sweep only."""

    @field_validator("multipliers")
    @classmethod
    def _several(cls, value: list[float]) -> list[float]:
        if len(set(value)) < 2:
            raise UserError(f"{HERE} is {value!r}; give at least two, such as [0.5, 1, 2]")
        return sorted(value)


class Continuation(Settings):
    """A task of the study's own held-out text: which of four continuations follows? See `entasis.data.continuations`."""

    items: Annotated[int, Field(ge=1, le=1_000_000)] = 200
    context: Annotated[int, Field(ge=1, le=1_000_000)] = 40
    """Words before each continuation."""
    continuation: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    """Words of each."""
    seed: Annotated[int, Field(ge=0)] = 0


class Downstream(Settings):
    """lm-eval tasks that every finished run answers; see `entasis.study.downstream`."""

    tasks: list[str] = Field(default_factory=list)
    continuation: Continuation | None = None
    include_path: str | None = None
    """A folder with task definitions of one's own."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """At most so many questions of a task."""

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if not self.tasks and self.continuation is None:
            raise UserError(
                f"{HERE}.tasks is []; name tasks of lm-eval, or give continuation: {{items: 200}}"
            )
        return self


class CorpusSource(Settings):
    """A corpus that the study makes itself: arguments of `entasis data prepare`."""

    renamed: ClassVar = {"spoilt": "copy_of", "danger": "corruption"}

    sources: Annotated[list[str], BeforeValidator(_listed)] = Field(default_factory=list)
    """Files and folders; `stdlib` is the interpreter's own standard library."""
    train_tokenizer: Annotated[int, Field(ge=257, le=2**24)] | None = None
    tokenizer: str | None = None
    validation: Annotated[Share, Field(gt=0)] = 0.05
    """Share of the text held out, in whole files."""
    limit: Count | None = None
    """At most so many bytes of source text, whole files drawn by name."""
    copy_of: str | None = None
    """Instead of sources: another corpus of the study, its ids corrupted on purpose by `corruption`."""
    corruption: str | None = None
    """A fault of `entasis.data.corruption`."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.copy_of:
            if not self.corruption or self.sources:
                raise UserError(f"{HERE}: give copy_of, a corpus above it, and corruption, and no sources")
        elif not self.sources:
            raise UserError(f"{HERE}: sources is missing; list files or folders, or stdlib")
        elif (self.tokenizer is None) == (self.train_tokenizer is None):
            raise UserError(
                f"{HERE}: give either tokenizer (a file or name) or train_tokenizer (a vocabulary)"
            )
        return self


class _Until(Settings):
    """As written; `Until` is what it comes to."""

    seeds: Annotated[int, Field(ge=2, le=_MOST_SEEDS)] | None = None
    detectable: Annotated[float, Field(gt=0)] | None = None
    method: Method = "anytime"
    g: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    looks: list[Annotated[int, Field(ge=2, le=_MOST_SEEDS)]] = Field(default_factory=list)
    spending: Spending = "obrien-fleming"


class Study(Settings):
    """A study as it will be run; `entasis.study.study_files` reads it."""

    name: str
    title: str
    base: dict[str, Any]
    arms: Changes
    baseline: Annotated[str, BeforeValidator(str)]
    contrasts: Annotated[dict[str, list[str]], BeforeValidator(_named)] = Field(default_factory=dict)
    """Arms, each with the arms that it is compared with besides the baseline; planned before the first run."""
    seeds: Seeds = Field(default=3, validate_default=True)
    until: Until | None = None
    """When the study ends, if it adds seeds until it knows; null: all arms get all seeds."""
    protocols: Annotated[list[Protocol], BeforeValidator(_protocols)] = ["params"]  # noqa: RUF012
    margin: Size = 0.01
    """Bits per byte: a smaller difference would not matter to the one who asks."""
    learning_rate: Literal["shared", "mup"] = "shared"
    sweep: Sweep | None = None
    tolerance: Annotated[Share, Field(gt=0)] = 0.005
    """How far an arm's parameters may be from the baseline's under the protocol `params`, as a share."""
    hours: Size | None = None
    """Device time of each run under the protocol `time`; null is what the baseline's tokens take."""
    noise: Size | None = None
    """Known standard deviation of a paired difference in bits per byte, for planning."""
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    """CPU threads of one run; as many runs go at once as there are such shares of the cores. Null: OMP_NUM_THREADS where
    that is set, else all."""
    corpora: Annotated[dict[str, CorpusSource], BeforeValidator(_named)] = Field(default_factory=dict)
    downstream: Downstream | None = None
    trunks: Changes = Field(default_factory=dict)
    """As arms; their runs are what arms start from; see `entasis.study.trunks`."""
    controls: list[str] = Field(default_factory=list)
    """Positive controls: arms with `control: true`, known to be worse, exempt from equal cost and from Holm."""

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, source: Any) -> Any:
        """What follows from other keys: title, baseline, controls, the seeds of a sweep and of `until`."""
        plain = {key: value for key, value in dict(source).items() if value is not None}
        for key in ("base", "arms"):
            if not isinstance(plain.get(key), Mapping) or not plain[key]:
                raise UserError(f"{key} is missing; it must be a mapping")
        plain.setdefault("title", plain["name"])
        plain.setdefault("baseline", next(iter(plain["arms"])))
        if isinstance(plain.get("sweep"), list):
            plain["sweep"] = {"multipliers": plain["sweep"]}
        _mark_controls(plain)
        _extend_seeds(plain)
        return plain

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.baseline not in self.arms:
            raise UserError(f"baseline is {self.baseline!r}, not an arm; {advise(self.baseline, self.arms)}")
        for name in [*self.arms, *self.trunks]:
            if not name or set(name) & set("/\\@ ") or name.startswith("."):
                raise UserError(f"arm {name!r} names a folder; use letters, digits, - and _")
        if both := self.trunks.keys() & self.arms.keys():
            raise UserError(f"{sorted(both)[0]} is an arm and a trunk; give them different names")
        for where, changes in self._recipes():
            # 0 stands in every recipe that was written out.
            if changes.get("seed", 0) != 0:
                seeds = f"{'sweep.' if where == 'sweep.changes' else ''}seeds: [{changes['seed']}]"
                raise UserError(f"{where}.seed is {changes['seed']!r}, which runs do not go by; use {seeds}")
        if self.hours is not None and "time" not in self.protocols:
            raise UserError(
                f"hours is {self.hours:g}, the length of runs under the protocol time, which is not in protocols; "
                "leave it out"
            )
        above: list[str] = []
        for name, corpus in self.corpora.items():
            if corpus.copy_of and corpus.copy_of not in above:
                raise UserError(f"corpora.{name}: copy_of is {corpus.copy_of!r}; name a corpus above it")
            above.append(name)
        for pair in self.contrasted:
            self._check_contrast(*pair)
        if self.sweep and (shared := sorted(set(self.sweep.seeds) & set(self.seeds))):
            raise UserError(
                f"sweep.seeds holds {shared[0]}, a seed of the study too; choose others, or say how many (2)"
            )
        trunks.check(list(self.trunks), {name: self.trunk_of(name) for name in [*self.trunks, *self.arms]})
        return self

    def _recipes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Everything that a run's recipe is made of, with its place in the file."""
        yield "base", self.base
        for part in ("arms", "trunks"):
            yield from ((f"{part}.{name}", changes) for name, changes in getattr(self, part).items())
        if self.sweep:
            yield "sweep.changes", self.sweep.changes

    @property
    def contrasted(self) -> list[tuple[str, str]]:
        """The contrasts, one by one: an arm, and what it is compared with."""
        return [(arm, rival) for arm, rivals in self.contrasts.items() for rival in rivals]

    def _check_contrast(self, arm: str, rival: str) -> None:
        where = f"contrasts: {arm}: {rival}"
        for name in (arm, rival):
            if name not in self.arms:
                raise UserError(f"{where}: {name!r} is no arm; {advise(name, self.arms)}")
            if name in self.controls:
                raise UserError(f"{where}: {name} is a control, which is compared with the baseline alone")
            if name == self.baseline:
                raise UserError(f"{where}: every arm is compared with the baseline, {name}, anyway")
        if arm == rival or self.contrasted.count((arm, rival)) > 1 or (rival, arm) in self.contrasted:
            raise UserError(f"{where}: an arm is compared with itself, or two arms twice")

    def base_of(self, name: str) -> dict[str, Any]:
        """What an arm or trunk changes."""
        return trunks.without_trunk(self.base) if name in self.trunks else self.base

    def changes_of(self, name: str) -> dict[str, Any]:
        """The changes that an arm or trunk is."""
        return self.trunks[name] if name in self.trunks else self.arms[name]

    def trunk_of(self, name: str) -> str | None:
        """The trunk that an arm or trunk starts from."""
        try:
            return trunks.named_in(changed(self.base_of(name), self.changes_of(name)))
        except UserError as error:
            raise UserError(f"{name}: {error}") from error

    def to_yaml(self) -> str:
        """What `study.yaml` in the study's folder holds; `entasis.study.study_files.read` reads it back."""
        plain = self.to_dict()
        for part in (plain, plain.get("sweep") or {}, *plain.get("corpora", {}).values()):
            for key in [key for key, value in part.items() if value is None or value in ({}, [])]:
                del part[key]
        for name in plain.pop("controls", []):
            plain["arms"][name] = {"control": True, **plain["arms"][name]}
        return yaml.safe_dump(plain, sort_keys=False, width=110, allow_unicode=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        until = dataclasses.asdict(self.until) if self.until else None
        return self.model_dump(exclude={"until"}) | {"until": until}


def _mark_controls(plain: dict[str, Any]) -> None:
    """Takes the marks `control: true` off the arms; one that changes nothing is the baseline at half its tokens."""
    arms = {str(k): dict(v) if isinstance(v, Mapping) else v for k, v in plain["arms"].items()}
    plain["arms"], marked = arms, []
    for name, changes in arms.items():
        mark = changes.pop("control", False) if isinstance(changes, dict) else False
        if not isinstance(mark, bool):
            raise UserError(f"arms.{name}.control is {mark!r}; write true, or leave it out")
        if mark and name == str(plain["baseline"]):
            raise UserError(f"arm {name} is the baseline, and cannot be its own control")
        if mark and not changes:
            like = arms.get(str(plain["baseline"])) or {}
            tokens = like.get("tokens", plain["base"].get("tokens"))
            if tokens is None or any(stage.get("tokens") for stage in like.get("stages") or []):
                raise UserError(
                    f"control {name}: {plain['baseline']} has no tokens to halve; say what it changes"
                )
            changes |= {**like, "tokens": quantities.count(tokens, "base.tokens") // 2}
        if mark:
            marked.append(name)
    plain["controls"] = marked


def _extend_seeds(plain: dict[str, Any]) -> None:
    """All seeds that the study may come to under `until`: those given, then the next numbers; a sweep's begin after."""
    try:
        seeds = _seeds(plain.get("seeds", 3))
    except UserError:
        return  # told where the field is read
    if plain.get("until") is not None:
        given = parse(_Until, plain["until"], "until")
        most = given.seeds or max(20, len(seeds))
        if given.looks and (given.looks != sorted(set(given.looks)) or given.looks[-1] > most):
            raise UserError(
                f"until.looks are {given.looks}; write ascending numbers of seeds, no more than seeds, which is {most}"
            )
        further = (s for s in itertools.count() if s not in seeds)
        plain["until"] = Until(**{**given.model_dump(), "seeds": most})
        plain["seeds"] = seeds = [*seeds, *itertools.islice(further, max(0, most - len(seeds)))]
    sweep = plain.get("sweep")
    if isinstance(sweep, Mapping):
        number = sweep.get("seeds", 1)
        if isinstance(number, int) and not isinstance(number, bool) and 0 < number <= _MOST_SEEDS:
            first = max(_SWEEP_SEEDS, max(seeds) + 1)
            plain["sweep"] = {**sweep, "seeds": list(range(first, first + number))}


def changed(recipe: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of a recipe's mapping with dot-keys set (`shape.profile: crown`, `stages.0.tokens: 4k`).

    A change of `shape` itself replaces it whole. Setting `shape.preset` drops a profile, and the other way. Raises
    `UserError` for an entry that a list does not have.
    """
    result = copy.deepcopy(dict(recipe))
    for key, value in changes.items():
        path = str(key).split(".")
        target: Any = result
        for part, following in itertools.pairwise(path):
            place = _place(target, part, key)
            inside = target[place] if isinstance(target, list) else target.get(place)
            if not isinstance(inside, dict | list):
                target[place] = [] if following.isdigit() else {}
            target = target[place]
        target[_place(target, path[-1], key)] = copy.deepcopy(value)
    return result


def _place(target: Any, part: str, key: object) -> Any:
    """Where a part of a dot-key stands in a mapping or a list."""
    if not isinstance(target, list):
        return part
    if not part.isdigit() or int(part) >= len(target):
        raise UserError(f"{key}: there are {len(target)} entries, numbered from 0; {part!r} is not one")
    return int(part)
