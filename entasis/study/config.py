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
import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import Field

from entasis import quantities
from entasis.configuration import Settings, load_yaml, parse
from entasis.errors import UserError
from entasis.shape import specification
from entasis.study import trunks
from entasis.study.planned_looks import Spending
from entasis.study.stopping import Method, Until

Protocol = Literal["params", "flops", "time"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Learning rates tried for every arm before the study proper, each as a multiple of the base recipe's."""

    multipliers: list[float]
    seeds: list[int]
    """None of them the study's."""
    changes: dict[str, Any] = field(default_factory=dict)
    """The stated small size: dot-keys changed in the recipe for the sweep only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Downstream:
    """lm-eval tasks that every finished run answers; see `entasis.study.downstream`."""

    tasks: list[str]
    include_path: str | None = None
    """A folder with task definitions of one's own."""
    limit: int | None = None
    """At most so many questions of a task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSource:
    """A corpus that the study makes itself: arguments of `entasis data prepare`."""

    sources: list[str] = field(default_factory=list)
    """Files and folders; `stdlib` is the interpreter's own standard library."""
    train_tokenizer: int | None = None
    tokenizer: str | None = None
    validation: float = 0.05
    """Share of the text held out, in whole files."""
    limit: int | None = None
    """At most so many bytes of source text, whole files drawn by name."""
    copy_of: str | None = None
    """Instead of sources: another corpus of the study, its ids corrupted on purpose by `corruption`."""
    corruption: str | None = None
    """A fault of `entasis.data.corruption`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A study as it will be run. Built by `read`, which checks everything."""

    name: str
    title: str
    base: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    baseline: str
    seeds: list[int]
    protocols: list[Protocol]
    margin: float
    """Bits per byte: a smaller difference would not matter to the one who asks."""
    learning_rate: Literal["shared", "mup"] = "shared"
    sweep: Sweep | None = None
    tolerance: float = 0.005
    """How far an arm's parameters may be from the baseline's under the protocol `params`, as a share."""
    hours: float | None = None
    """Device time of each run under the protocol `time`; null is what the baseline's tokens take."""
    noise: float | None = None
    """Known standard deviation of a paired difference in bits per byte, for planning."""
    threads: int | None = None
    """CPU threads of one run; as many runs go at once as there are such shares of the cores. Null is all."""
    corpora: dict[str, CorpusSource] = field(default_factory=dict)
    downstream: Downstream | None = None
    trunks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Named changes to the base, as arms, whose runs arms start from; see `entasis.study.trunks`."""
    until: Until | None = None
    """When the study ends, if it adds seeds until it knows; null: all arms get all seeds."""
    controls: list[str] = field(default_factory=list)
    """Positive controls: arms with `control: true`, known to be worse, exempt from equal cost and from Holm."""

    def base_of(self, name: str) -> dict[str, Any]:
        """What an arm or trunk changes."""
        return trunks.without_trunk(self.base) if name in self.trunks else self.base

    def changes_of(self, name: str) -> dict[str, Any]:
        """The changes that an arm or trunk is."""
        return self.trunks[name] if name in self.trunks else self.arms[name]

    def trunk_of(self, name: str) -> str | None:
        """The trunk that an arm or trunk starts from."""
        return trunks.named_in(changed(self.base_of(name), self.changes_of(name)))

    def to_yaml(self) -> str:
        """What `study.yaml` in the study's folder holds; `read` reads it back."""
        plain = {k: v for k, v in dataclasses.asdict(self).items() if v not in (None, {}, [])}
        for name in plain.pop("controls", []):
            plain["arms"][name] = {"control": True, **plain["arms"][name]}
        return yaml.safe_dump(plain, sort_keys=False, width=110, allow_unicode=True)


class _Corpus(Settings):
    renamed: ClassVar = {"spoilt": "copy_of", "danger": "corruption"}

    sources: str | list[str] | None = None
    train_tokenizer: Annotated[int, Field(ge=257, le=2**24)] | None = None
    tokenizer: str | None = None
    validation: Any = None
    limit: Any = None
    copy_of: str | None = None
    corruption: str | None = None


class _Downstream(Settings):
    tasks: list[str]
    include_path: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None


class _Until(Settings):
    seeds: Annotated[int, Field(ge=2, le=10_000)] | None = None
    detectable: Annotated[float, Field(gt=0)] | None = None
    method: Method = "anytime"
    g: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    looks: list[Annotated[int, Field(ge=2, le=10_000)]] = Field(default_factory=list)
    spending: Spending = "obrien-fleming"


class _Written(Settings):
    """Of what type each key of a study file is, as far as one look at it tells."""

    name: str | None = None
    title: str | None = None
    base: dict[str, Any] | None = None
    arms: dict[Any, dict[str, Any] | None] | None = None
    baseline: str | int | None = None
    seeds: int | list[Annotated[int, Field(ge=0, lt=2**63)]] | None = None
    protocols: str | list[str] | None = None
    margin: Any = None
    learning_rate: str | None = None
    sweep: dict[str, Any] | list[float] | None = None
    tolerance: Any = None
    hours: Any = None
    noise: Any = None
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    trunks: dict[Any, dict[str, Any] | None] | None = None
    corpora: dict[Any, Any] | None = None
    downstream: dict[str, Any] | None = None
    until: dict[str, Any] | None = None
    sizes: dict[Any, dict[str, Any] | None] | None = None
    size: str | int | None = None
    extends: str | None = None


_MOST_SEEDS = 10_000
_SWEEP_SEEDS = 1000
"""Where the sweep's seeds begin, so that a study may be given more seeds."""
_OTHER_KEYS = ("sizes", "size", "extends")


def shipped() -> list[str]:
    """Names of the studies that come with the package."""
    folder = resources.files("entasis.study").joinpath("studies")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def read(path_or_name: str | Path, *, size: str | None = None, overrides: Sequence[str] = ()) -> Study:
    """The study in a YAML file, or a shipped one by its name, at one of its `sizes` where it has any.

    `overrides` are `key=value` with dots for keys inside keys (`seeds=5`, `base.tokens=2M`).

    Raises `UserError` naming the file, the key, its value and what would be valid.
    """
    path = Path(path_or_name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"study {path}: no such file")
        name, where = path.stem, f"study {path}"
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: cannot be read: {error}") from error
    elif str(path_or_name) in shipped():
        name, where = str(path_or_name), f"study {path_or_name}"
        text = (
            resources.files("entasis.study").joinpath("studies", f"{name}.yaml").read_text(encoding="utf-8")
        )
    else:
        raise UserError(
            f"study {path_or_name}: neither a YAML file nor a shipped study{_nearest(str(path_or_name), shipped())}"
        )
    source = load_yaml(text, where)
    changes = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"override {override!r}: write key=value, as in seeds=5")
        changes[key] = load_yaml(value, f"override {override!r}")
    return from_dict(source, name=name, where=where, size=size, changes=changes)


def from_dict(
    source: Any,
    *,
    name: str,
    where: str = "study",
    size: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Study:
    """A study from a plain mapping; see `read`. `changes` are dot-keys set after the size is chosen."""
    if not isinstance(source, Mapping):
        raise UserError(f"{where}: must be a mapping with base: and arms:")
    known = _known_keys()
    _check_keys(source, [*known, *_OTHER_KEYS], where)
    parse(_Written, dict(source), where)
    own = {"name": name, **copy.deepcopy(dict(source))}
    plain = _extended(own, size, where) if "extends" in own else _at_size(own, size, where)
    plain = changed(plain, changes or {})
    _check_keys(plain, known, where)
    parse(_Written, plain, where)
    for key in ("base", "arms"):
        if not isinstance(plain.get(key), Mapping) or not plain[key]:
            raise UserError(f"{where}: {key} is missing; it must be a mapping")
    plain.setdefault("title", plain["name"])
    arms = {str(k): dict(v or {}) for k, v in plain["arms"].items()}
    plain["arms"] = arms
    plain.setdefault("baseline", next(iter(arms)))
    plain["baseline"] = str(plain["baseline"])
    if plain["baseline"] not in arms:
        raise UserError(
            f"{where}: baseline is {plain['baseline']!r}, not an arm{_nearest(str(plain['baseline']), arms)}"
        )
    plain["trunks"] = {str(k): dict(v or {}) for k, v in (plain.get("trunks") or {}).items()}
    for name in [*arms, *plain["trunks"]]:
        if not name or set(name) & set("/\\@ ") or name.startswith("."):
            raise UserError(f"{where}: arm {name!r} names a folder; use letters, digits, - and _")
    if both := plain["trunks"].keys() & arms.keys():
        raise UserError(f"{where}: {sorted(both)[0]} is an arm and a trunk; give them different names")
    plain["controls"] = _controls(plain, where)
    plain["seeds"] = _seeds(plain.get("seeds", 3), f"{where}: seeds")
    plain["until"], plain["seeds"] = _until(plain.get("until"), plain["seeds"], f"{where}: until")
    plain["protocols"] = _protocols(plain.get("protocols", ["params"]), where)
    plain["sweep"] = _sweep(plain.get("sweep"), plain["seeds"], where)
    plain["downstream"] = _downstream(plain.get("downstream"), f"{where}: downstream")
    plain["corpora"] = _corpora(plain.get("corpora") or {}, where)
    for key, least in (("margin", 0.0), ("tolerance", 0.0), ("hours", 0.0), ("noise", 0.0)):
        if plain.get(key) is not None:
            plain[key] = _number(plain[key], least, f"{where}: {key}")
    plain.setdefault("margin", 0.01)
    if plain.get("learning_rate", "shared") not in ("shared", "mup"):
        raise UserError(
            f"{where}: learning_rate is {plain['learning_rate']!r}; use shared or mup, or give sweep:"
        )
    study = Study(**{k: v for k, v in plain.items() if v is not None or k in ("sweep",)})
    try:
        starts = {name: study.trunk_of(name) for name in [*study.trunks, *arms]}
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    trunks.check(list(study.trunks), starts, where)
    return study


def changed(recipe: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of a recipe's mapping with dot-keys set (`shape.profile: crown`).

    A change of `shape` itself replaces it whole. Setting `shape.preset` drops a profile, and the other way.
    """
    result = copy.deepcopy(dict(recipe))
    for key, value in changes.items():
        *path, last = str(key).split(".")
        target = result
        for part in path:
            if not isinstance(target.get(part), dict):
                target[part] = {}
            target = target[part]
        target[last] = copy.deepcopy(value)
    return result


def _at_size(source: dict[str, Any], size: str | None, where: str) -> dict[str, Any]:
    """The study at one size: `sizes` holds, per name, changes to the base (dot-keys) and other keys replaced."""
    sizes = source.pop("sizes", None) or {}
    default = source.pop("size", None)
    size = size or default
    if size is None:
        if sizes:
            raise UserError(f"{where}: choose a --size: {', '.join(sizes)}")
        return source
    if size not in sizes:
        known = f"; it has {', '.join(sizes)}" if sizes else "; it has no sizes"
        raise UserError(f"{where}: there is no size {size!r}{known}")
    over = dict(sizes[size] or {})
    _mapping(over.get("base"), f"{where}: sizes.{size}.base")
    _check_keys(over, _known_keys(), f"{where}: sizes.{size}")
    source["base"] = changed(source.get("base") or {}, over.pop("base", {}))
    source["name"] = f"{source['name']}-{size}"
    return {**source, **over}


def _extended(source: dict[str, Any], size: str | None, where: str) -> dict[str, Any]:
    """A shipped study at one of its sizes, with this one's changes: to the base by dot-keys, corpora added."""
    parent = str(source.pop("extends"))
    if parent not in shipped():
        raise UserError(f"{where}: extends is {parent!r}, not a shipped study{_nearest(parent, shipped())}")
    text = resources.files("entasis.study").joinpath("studies", f"{parent}.yaml").read_text(encoding="utf-8")
    name = source.pop("name")
    plain = _at_size({"name": name, **load_yaml(text, f"study {parent}")}, size, f"study {parent}")
    plain["base"] = changed(plain["base"], source.pop("base", {}))
    plain["corpora"] = {**plain.get("corpora", {}), **source.pop("corpora", {})}
    return {**plain, **source}


def _known_keys() -> list[str]:
    """What a study file may hold, but for sizes and what it extends; controls are marked where the arms are."""
    return [f.name for f in dataclasses.fields(Study) if f.name != "controls"]


def _controls(plain: Mapping[str, Any], where: str) -> list[str]:
    """The arms marked `control: true`, the mark taken off; one that changes nothing is the baseline at half its tokens."""
    marks = {name: changes.pop("control", False) for name, changes in plain["arms"].items()}
    for name, mark in marks.items():
        if not isinstance(mark, bool):
            raise UserError(f"{where}: arms.{name}.control is {mark!r}; write true, or leave it out")
        if mark and name == plain["baseline"]:
            raise UserError(f"{where}: arm {name} is the baseline, and cannot be its own control")
        if mark and not plain["arms"][name]:
            like = plain["arms"][plain["baseline"]]
            tokens = like.get("tokens", plain["base"].get("tokens"))
            if tokens is None or "stages" in like:
                raise UserError(
                    f"{where}: control {name}: {plain['baseline']} has no tokens to halve; say what it changes"
                )
            plain["arms"][name] = {**like, "tokens": quantities.count(tokens, "base.tokens") // 2}
    return [name for name, mark in marks.items() if mark]


def _until(value: Any, seeds: list[int], where: str) -> tuple[Until | None, list[int]]:
    """When the study ends, and all seeds that it may come to: those given, then the next numbers."""
    if value is None:
        return None, seeds
    given = parse(_Until, value, where)
    most = given.seeds or max(20, len(seeds))
    until = Until(**{**given.model_dump(), "seeds": most})
    if until.looks and (until.looks != sorted(set(until.looks)) or until.looks[-1] > most):
        raise UserError(
            f"{where}.looks are {until.looks}; write ascending numbers of seeds, no more than seeds, which is {most}"
        )
    further = (s for s in itertools.count() if s not in seeds)
    return until, [*seeds, *itertools.islice(further, max(0, most - len(seeds)))]


def _sweep(value: Any, seeds: Sequence[int], where: str) -> Sweep | None:
    if value is None:
        return None
    if isinstance(value, list):
        value = {"multipliers": value}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: sweep is {value!r}; give a list of multipliers such as [0.5, 1, 2]")
    _check_keys(value, [f.name for f in dataclasses.fields(Sweep)], f"{where}: sweep")
    multipliers = value.get("multipliers")
    if not isinstance(multipliers, list) or len(set(map(str, multipliers))) < 2:
        raise UserError(
            f"{where}: sweep.multipliers is {multipliers!r}; give at least two, such as [0.5, 1, 2]"
        )
    return Sweep(
        multipliers=sorted(_number(m, 0.0, f"{where}: sweep.multipliers") for m in multipliers),
        changes=_mapping(value.get("changes"), f"{where}: sweep.changes"),
        seeds=_sweep_seeds(value.get("seeds", 1), seeds, f"{where}: sweep.seeds"),
    )


def _downstream(value: Any, where: str) -> Downstream | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not isinstance(value.get("tasks"), list) or not value["tasks"]:
        raise UserError(f"{where} is {value!r}; give tasks: [names of lm-eval tasks]")
    _check_keys(value, [f.name for f in dataclasses.fields(Downstream)], where)
    parse(_Downstream, dict(value), where)
    return Downstream(**value)


def _corpora(value: Any, where: str) -> dict[str, CorpusSource]:
    if not isinstance(value, Mapping):
        raise UserError(
            f"{where}: corpora is {value!r}; it must be a mapping from names to {{sources: [...]}}"
        )
    result: dict[str, CorpusSource] = {}
    for name, entry in value.items():
        inside = f"{where}: corpora.{name}"
        if isinstance(entry, Mapping):
            parse(_Corpus, dict(entry), inside)
        if isinstance(entry, Mapping) and entry.get("copy_of"):
            if entry["copy_of"] not in result or not entry.get("corruption") or entry.get("sources"):
                raise UserError(f"{inside}: give copy_of, a corpus above it, and corruption, and no sources")
            result[str(name)] = CorpusSource(**entry)
            continue
        if not isinstance(entry, Mapping) or not entry.get("sources"):
            raise UserError(f"{inside}: sources is missing; list files or folders, or stdlib")
        entry = dict(entry)
        if isinstance(entry["sources"], str):
            entry["sources"] = [entry["sources"]]
        if (entry.get("tokenizer") is None) == (entry.get("train_tokenizer") is None):
            raise UserError(
                f"{inside}: give either tokenizer (a file or name) or train_tokenizer (a vocabulary)"
            )
        if entry.get("limit") is not None:
            entry["limit"] = specification.number(entry["limit"], f"{inside}: limit")
        entry["validation"] = _number(entry.get("validation", 0.05), 0.0, f"{inside}: validation")
        result[str(name)] = CorpusSource(**entry)
    return result


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"{where} is {value!r}; it must be a mapping")
    return dict(value or {})


def _sweep_seeds(value: Any, others: Sequence[int], where: str) -> list[int]:
    """Seeds of the sweep, none of them the study's: a rate chosen on a seed would fit that seed's luck."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST_SEEDS:
        first = max(_SWEEP_SEEDS, max(others) + 1)
        return list(range(first, first + value))
    own = _seeds(value, where)
    if shared := sorted(set(own) & set(others)):
        raise UserError(
            f"{where} holds {shared[0]}, a seed of the study too; choose others, or say how many (2)"
        )
    return own


def _seeds(value: Any, where: str) -> list[int]:
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST_SEEDS:
        return list(range(value))
    valid = isinstance(value, list) and value and all(isinstance(s, int) and s >= 0 for s in value)
    if not valid or len(set(value)) != len(value):
        raise UserError(f"{where} is {value!r}; give how many (5) or a list of different ones ([0, 1, 2])")
    return list(value)


def _protocols(value: Any, where: str) -> list[Protocol]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names:
        raise UserError(
            f"{where}: protocols is {value!r}; list one or more of {', '.join(get_args(Protocol))}"
        )
    for name in names:
        if name not in get_args(Protocol):
            raise UserError(f"{where}: protocols holds {name!r}; use {', '.join(get_args(Protocol))}")
    return list(dict.fromkeys(names))


def _number(value: Any, above: float, where: str) -> float:
    given = value
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*%\s*", value):
        value = float(value.strip().removesuffix("%")) / 100
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < 10**9:
        value = given
        raise UserError(f"{where} is {value!r}; it must be a number above {above:g}")
    return float(value)


def _check_keys(source: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in source:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{_nearest(str(key), known)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
