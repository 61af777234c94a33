"""A recipe: everything that determines a run, as dataclasses read from YAML.

    entasis train tiny optimizer.lr=1e-3 tokens=2M --output runs/tiny

`read` gives the recipe as written; `resolve` spells out what it leaves open (the layer list, the stages,
counts in whole numbers), so that the `recipe.yaml` in a run's folder repeats the run exactly.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from entasis.errors import UserError
from entasis.shape import specification
from entasis.shape.shapes import ModelShape
from entasis.shape.solve import Solution
from entasis.train import mistakes
from entasis.train.schedule import Schedule, Share, part

Count = int | str
"""A number of tokens: 393216, 393_216, "200k", "5B"."""


@dataclass
class Data:
    """What is read. Paths of corpora (folders made by `entasis data`), relative to where the command runs."""

    train: str
    validation: str | None = None
    sequence: int = 1024
    document_masking: bool = False
    """Attention stays inside a document."""
    dangerous: bool = False
    """Trains on a corpus whose ids were spoilt on purpose (`entasis.data.dangerous`)."""


@dataclass
class Batch:
    tokens: Count = 65_536
    """Tokens per optimizer step, over all ranks: a multiple of data.sequence."""
    micro: int | Literal["auto"] = "auto"
    """Sequences in one forward pass of one rank; the rest is accumulated. Lower it when memory runs out."""


@dataclass
class Optimizer:
    name: Literal["adamw", "muon"] = "adamw"
    """`muon` takes the hidden matrices; AdamW everything else."""
    lr: float = 6e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    """On hidden matrices and an untied head; never on norms, biases and embeddings."""
    eps: float = 1e-8
    clip: float | None = 1.0
    """Largest gradient norm; null does not clip."""
    parametrisation: Literal["standard", "mup"] = "standard"
    base_width: int | None = None
    """muP: the d_model at which lr was found."""
    base_head_dim: int | None = None
    """muP: the head_dim at which lr was found; null is the shape's own."""


@dataclass
class Evaluation:
    every: Share | None = None
    """Validate every so many steps; always at the end."""
    tokens: Count | None = None
    """Whole documents up to so many tokens, the same ones each time; null is the whole corpus."""


@dataclass
class Checkpoint:
    every: Share | None = "10%"
    keep_last: int = 2
    keep_every: int | None = None
    """Checkpoints at multiples of so many steps stay, with `model.safetensors` beside them."""


@dataclass
class Parallel:
    """How several processes (`torchrun`) share the work; one process alone holds the whole model."""

    kind: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """`ddp`: each holds the whole model. `fsdp`: each holds a share. `hsdp`: shares within a machine, copies across."""
    shard: int | None = None
    """hsdp: processes that share one copy; null is those of one machine."""


@dataclass
class Logging:
    tensorboard: bool = True
    wandb: bool = False


@dataclass
class Stage:
    """A stretch of training. What is null is taken from the recipe."""

    train: Literal["all", "newest"] | list[str] = "all"
    """Parameters that learn: all, the newest layers, or patterns of names such as `blocks.3.*`."""
    tokens: Count | None = None
    schedule: Schedule | None = None
    grow: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None


@dataclass
class Recipe:
    shape: dict[str, Any]
    """A preset, a profile with a budget, or the explicit layer list; see `entasis.shape.specification`."""
    data: Data
    tokens: Count | None = None
    """Tokens to train on; may be left out when every stage has its own."""
    batch: Batch = field(default_factory=Batch)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    attention: Literal["auto", "sdpa", "plain", "flex"] = "auto"
    device: str = "auto"
    parallel: Parallel = field(default_factory=Parallel)
    activation_memory: int | str | None = None
    """Most bytes ("8GiB") that the layers of one micro-batch may keep for the backward pass; the costliest layers are
    computed twice to stay within it. Null keeps everything."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    logging: Logging = field(default_factory=Logging)
    stages: list[Stage] = field(default_factory=list)

    @property
    def sequences(self) -> int:
        """Sequences per optimizer step over all ranks (of a resolved recipe)."""
        return int(self.batch.tokens) // self.data.sequence

    def steps(self, stage: Stage) -> int:
        """Optimizer steps of one stage (of a resolved recipe), at least one."""
        return max(1, round(count(stage.tokens, "tokens") / int(self.batch.tokens)))

    @property
    def total_steps(self) -> int:
        return sum(self.steps(stage) for stage in self.stages)


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("entasis.train").joinpath("recipes")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def read(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, or a shipped one by its name, with `key=value` overrides (`optimizer.lr=1e-3`, `--tokens=5M`).

    Raises `UserError` for anything misspelt (with the nearest valid key) or of the wrong type.
    """
    source: dict[str, Any] = {}
    if path is not None:
        source_file: Any = Path(path)
        if str(path) in shipped() and not source_file.is_file():
            source_file = resources.files("entasis.train").joinpath("recipes", f"{path}.yaml")
        try:
            text = source_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            advice = "" if Path(path).suffix else f"; recipes that come along: {', '.join(shipped())}"
            raise UserError(f"recipe {path}: cannot be read: {error}{advice}") from error
        source = _load_yaml(text, f"recipe {path}")
        if not isinstance(source, dict):
            raise UserError(f"recipe {path}: must be a mapping with shape:, data: and tokens:")
    for override in overrides:
        key, equals, value = override.removeprefix("--").partition("=")
        if not equals:
            raise UserError(f"override {override!r}: write key=value, as in optimizer.lr=1e-3")
        _assign(source, key, _load_yaml(value, f"override {override!r}"))
    return from_dict(source)


def from_dict(source: Mapping[str, Any]) -> Recipe:
    """A recipe from a plain dictionary, typed by jsonargparse. Raises `UserError`."""
    import jsonargparse

    mistakes.check_keys(source, Recipe)
    for name in ("shape", "data"):
        if name not in source:
            raise UserError(f"recipe: {name} is missing")
    if "train" not in (source["data"] or {}):
        raise UserError("recipe: data.train is missing; name a corpus folder made by `entasis data prepare`")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--recipe", type=Recipe)
    try:
        # A deep copy: jsonargparse puts its own objects into nested lists.
        parsed = parser.parse_object({"recipe": copy.deepcopy(dict(source))})
        recipe: Recipe = parser.instantiate(parsed).recipe
    except jsonargparse.ArgumentError as error:
        raise UserError(mistakes.one_line(str(error), source, Recipe)) from error
    recipe.schedule.check()
    for i, stage in enumerate(recipe.stages):
        if stage.schedule is not None:
            stage.schedule.check(f"stages[{i}].schedule")
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """YAML that `read` reads back to an equal recipe; one line for each layer."""
    plain = dataclasses.asdict(recipe)
    plain["optimizer"]["betas"] = list(plain["optimizer"]["betas"])
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, width=110)


def resolve(recipe: Recipe, vocabulary: int) -> tuple[Recipe, ModelShape, list[str]]:
    """The recipe with nothing left open but what depends on the machine, its shape, and the solver's notes.

    `vocabulary` is the corpus's; a shape that names none gets it. Raises `UserError`.
    """
    recipe = from_dict(dataclasses.asdict(recipe))
    wanted = dict(recipe.shape)
    if "preset" not in wanted:
        wanted.setdefault("vocabulary", vocabulary)
    solution = specification.resolve(wanted)
    if recipe.optimizer.parametrisation == "mup":
        solution = with_mup_scales(solution, wanted, recipe.optimizer)
    recipe.shape = solution.shape.to_dict()
    recipe.batch.tokens = count(recipe.batch.tokens, "batch.tokens")
    sequence = recipe.data.sequence
    if sequence < 1:
        raise UserError(f"recipe: data.sequence is {sequence}; it must be at least 1")
    if recipe.batch.tokens < sequence or recipe.batch.tokens % sequence:
        nearest = max(1, round(recipe.batch.tokens / sequence)) * sequence
        raise UserError(
            f"recipe: batch.tokens is {recipe.batch.tokens}, not a multiple of data.sequence {sequence}; "
            f"the nearest is {nearest}"
        )
    if recipe.data.sequence > solution.shape.context:
        raise UserError(
            f"recipe: data.sequence is {sequence}, longer than the shape's context {solution.shape.context}; "
            "set shape.context"
        )
    if recipe.checkpoint.keep_last < 1:
        raise UserError(
            f"recipe: checkpoint.keep_last is {recipe.checkpoint.keep_last}; it must be at least 1"
        )
    if recipe.parallel.shard is not None and (recipe.parallel.kind != "hsdp" or recipe.parallel.shard < 1):
        raise UserError(
            f"recipe: parallel.shard is {recipe.parallel.shard} under parallel.kind {recipe.parallel.kind}; "
            "it is a number of processes from 1, and only for hsdp"
        )
    if recipe.activation_memory is not None:
        recipe.activation_memory = size(recipe.activation_memory, "activation_memory")
    _resolve_stages(recipe)
    total = recipe.total_steps
    for owner, name in ((recipe.evaluation, "evaluation"), (recipe.checkpoint, "checkpoint")):
        if owner.every is not None:
            owner.every = max(1, part(owner.every, total, f"{name}.every"))
    if recipe.evaluation.tokens is not None:
        recipe.evaluation.tokens = count(recipe.evaluation.tokens, "evaluation.tokens")
    return recipe, solution.shape, list(solution.notes)


def with_mup_scales(solution: Solution, wanted: Mapping[str, Any], optimizer: Optimizer) -> Solution:
    """The shape with muP's part of the function, but for fields that the specification `wanted` names itself.

    Logits shrink with the width. Products of queries and keys shrink with head_dim instead of its root, and are as
    ever at the base's head_dim; norms on queries and keys bound them already. Raises `UserError`.
    """
    shape, width, head_dim = solution.shape, optimizer.base_width, optimizer.base_head_dim
    if not width or width < 1:
        raise UserError(
            "recipe: optimizer.parametrisation is mup; give optimizer.base_width, where lr was found"
        )
    if head_dim is not None and head_dim < 1:
        raise UserError(f"recipe: optimizer.base_head_dim is {head_dim}; it must be at least 1")
    scales: dict[str, float | None] = {"logit_scale": width / shape.d_model}
    if shape.qk_norm == "none":
        same = head_dim is None or head_dim == shape.head_dim
        scales["attention_scale"] = None if same else math.sqrt(head_dim or 0) / shape.head_dim
    notes = [
        f"{name} is {wanted[name]!r} as the shape says, where muP has {scale!r}"
        for name, scale in scales.items()
        if name in wanted and wanted[name] != scale
    ]
    missing: dict[str, Any] = {name: scale for name, scale in scales.items() if name not in wanted}
    shape = dataclasses.replace(shape, **missing)
    return dataclasses.replace(solution, shape=shape, notes=(*solution.notes, *notes))


def _resolve_stages(recipe: Recipe) -> None:
    stages = recipe.stages or [Stage()]
    for i, stage in enumerate(stages):
        where = f"stages[{i}]"
        for name in ("grow", "lora"):
            if getattr(stage, name) is not None:
                raise UserError(f"recipe: {where}.{name} is not available yet; leave it out")
        if stage.train == "newest":
            raise UserError(
                f"recipe: {where}.train is newest, but no layer is new without grow; use all or patterns"
            )
        if stage.tokens is None and len(stages) == 1:
            stage.tokens = recipe.tokens
        if stage.tokens is None:
            missing = f"{where}.tokens" if recipe.stages else "tokens"
            raise UserError(f"recipe: {missing} is missing; say how many tokens to train on, such as 5M")
        stage.tokens = count(stage.tokens, f"{where}.tokens" if recipe.stages else "tokens")
        stage.schedule = dataclasses.replace(stage.schedule or recipe.schedule)
        steps = recipe.steps(stage)
        warmup = part(stage.schedule.warmup, steps, "schedule.warmup")
        decay = part(stage.schedule.decay, steps, "schedule.decay")
        if stage.schedule.name == "warmup-stable-decay" and warmup + decay > steps:
            raise UserError(f"recipe: schedule.warmup {warmup} and decay {decay} exceed the {steps} steps")
        if not 0 <= stage.schedule.floor <= 1:
            raise UserError(f"recipe: schedule.floor is {stage.schedule.floor}; it is a share of lr, 0 to 1")
    total = sum(int(stage.tokens or 0) for stage in stages)
    if recipe.tokens is not None and count(recipe.tokens, "tokens") != total:
        raise UserError(f"recipe: tokens is {recipe.tokens}, but the stages add up to {total}; leave one out")
    recipe.tokens, recipe.stages = total, stages


def count(value: Count | None, where: str) -> int:
    """A number of tokens: `393_216`, `"200k"`, `"1.5B"`. Raises `UserError`."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?(?:e\d+)?)\s*([kKMBT]?)", str(value).strip())
    result = 0.0
    if match:
        scale = {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match[2].replace("K", "k")]
        result = float(match[1].replace("_", "")) * scale
    if result < 1:
        raise UserError(f"recipe: {where} is {value!r}; write a number such as 393_216, 200k, 5M or 1.5B")
    return round(result)


def size(value: int | str, where: str) -> int:
    """Bytes: `8GiB`, `500MB`, `8_000_000_000`. Raises `UserError`."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?) ?(?:([kKMGT])(i?))?B?", str(value).strip())
    if not match or float(match[1]) == 0:
        raise UserError(f"recipe: {where} is {value!r}; write a size such as 8GiB, 500MB or 8_000_000_000")
    scale = (1024 if match[3] else 1000) ** (" KMGT".index(match[2].upper()) if match[2] else 0)
    return round(float(match[1]) * scale)


def difference(a: Recipe, b: Recipe) -> str | None:
    """The first key whose value differs, with both values; None for equal recipes."""

    def walk(x: Any, y: Any, key: str) -> str | None:
        if isinstance(x, dict) and isinstance(y, dict):
            for name in [*x, *(n for n in y if n not in x)]:
                if found := walk(x.get(name), y.get(name), f"{key}.{name}".lstrip(".")):
                    return found
            return None
        if isinstance(x, list | tuple) and isinstance(y, list | tuple) and len(x) == len(y):
            parts = (walk(v, w, f"{key}[{i}]") for i, (v, w) in enumerate(zip(x, y, strict=True)))
            return next(filter(None, parts), None)
        return None if x == y else f"{key} is {x!r} there and {y!r} here"

    return walk(dataclasses.asdict(a), dataclasses.asdict(b), "")


def _load_yaml(text: str, where: str) -> Any:
    import jsonargparse

    try:
        # jsonargparse's loader reads 6e-4 as a number, which YAML 1.1 does not.
        return jsonargparse.get_loader("yaml")(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def _assign(target: Any, key: str, value: Any) -> None:
    """Sets `stages.0.tokens` or `optimizer.lr` in nested mappings and lists."""
    *path, last = key.split(".")
    for i, name in enumerate(path):
        where = ".".join(path[: i + 1])
        if isinstance(target, list):
            target = target[_index(target, name, where)]
        else:
            if target.get(name) is None:
                target[name] = [] if [*path, last][i + 1].isdigit() else {}
            target = target[name]
        if not isinstance(target, dict | list):
            raise UserError(f"override {key}: {where} is {target!r}, which has no parts")
    if isinstance(target, list):
        target[_index(target, last, key)] = value
    else:
        target[last] = value


def _index(items: list[Any], name: str, where: str) -> int:
    if not name.isdigit() or int(name) >= len(items):
        raise UserError(
            f"override {where}: there are {len(items)} entries, numbered from 0; {name!r} is not one"
        )
    return int(name)


class _Dumper(yaml.SafeDumper):
    """Block style, but a layer (or any mapping or list of plain values inside a list) on one line."""


def _represent_mapping(dumper: yaml.SafeDumper, data: dict[str, Any]) -> yaml.Node:
    flow = set(data) == {"n_heads", "n_kv_heads", "d_ff"}
    return dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=flow)


_Dumper.add_representer(dict, _represent_mapping)
