"""A recipe as it is written: everything that determines a run, read from YAML.

    entasis train tiny optimizer.lr=1e-3 tokens=2M --output runs/tiny

`read` gives the recipe as written. What it leaves open is spelt out step by step (`entasis.train.resolved_recipe`), so
that the `recipe.yaml` in a run's folder repeats the run exactly. A new key is one typed field here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from entasis.configuration import HERE, Count, Settings, Size, Steps, TokenCount, load_yaml, parse, read_yaml
from entasis.data import mixture_rules
from entasis.data.held_out import Part
from entasis.errors import UserError
from entasis.train.schedule import Schedule

Positive = Annotated[int, Field(ge=1, le=2**31)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0, le=1e6)]


class WeightedCorpus(Settings):
    """One corpus of a mixture."""

    path: str
    weight: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Its share of the tokens, relative to the others' weights; left out where they follow from a rule."""


def _kind(value: object) -> str:
    return "<none>" if value is None else "<named>" if isinstance(value, Mapping) else "<path>"


def _named(corpora: dict[str, Any]) -> dict[str, Any]:
    if not corpora:
        raise UserError(f"{HERE}: names no corpus")
    if odd := [name for name in corpora if not re.fullmatch(r"[\w.-]+", name)]:
        raise UserError(f"{HERE}: {odd[0]!r} is no name for a corpus; use letters, digits, - . and _")
    return corpora


TrainingText = Annotated[
    Annotated[str, Tag("<path>")]
    | Annotated[dict[str, WeightedCorpus], AfterValidator(_named), Tag("<named>")],
    Discriminator(_kind),
]
"""A corpus, or several by name with their weights."""
HeldOutText = Annotated[
    Annotated[str, Tag("<path>")]
    | Annotated[dict[str, str], AfterValidator(_named), Tag("<named>")]
    | Annotated[None, Tag("<none>")],
    Discriminator(_kind),
]
"""A corpus, or several by name, each scored by itself too."""


def mixture_of(text: str | Mapping[str, WeightedCorpus]) -> dict[str, WeightedCorpus]:
    """The corpora of `data.train` by name; a lone one is called train."""
    return {"train": WeightedCorpus(path=text, weight=1.0)} if isinstance(text, str) else dict(text)


def held_out_of(text: str | Mapping[str, str] | None) -> dict[str, str]:
    """The paths of `data.validation` by name; a lone one is called validation."""
    if text is None:
        return {}
    return {"validation": text} if isinstance(text, str) else dict(text)


class _Training(Settings):
    """What is trained on."""

    train: TrainingText
    weights: str | dict[str, Any] | None = None
    """A rule that weighs the corpora of `train`, such as `proportional`; see `entasis.data.mixture_rules`."""

    @model_validator(mode="after")
    def _weighed_once(self) -> Self:
        corpora = {} if isinstance(self.train, str) else self.train
        if self.weights is not None:
            mixture_rules.read(self.weights, f"{HERE}.weights")
            if not corpora:
                raise UserError(f"{HERE}.weights is a rule for several corpora; train names one")
        for name, corpus in corpora.items():
            if corpus.weight is None and self.weights is None:
                raise UserError(f"{HERE}.train.{name}.weight is missing; give one, or a rule as weights")
            if corpus.weight is not None and self.weights is not None:
                raise UserError(f"{HERE}: gives both train.{name}.weight and weights; leave one out")
        return self


class Data(_Training):
    """What is read. Paths of corpora (folders made by `entasis data`), relative to where the command runs."""

    renamed: ClassVar = {"dangerous": "allow_corruption"}

    validation: HeldOutText = None
    sequence: Positive = 1024
    document_masking: bool = False
    """Attention stays inside a document."""
    allow_corruption: bool = False
    """Trains on a corpus whose ids were corrupted on purpose (`entasis.data.corruption`), or that the doctor accuses."""


class BatchSize(Settings):
    tokens: Count = 65_536
    """Tokens per optimizer step, over all ranks: a multiple of data.sequence."""
    micro: Positive | Literal["auto"] = "auto"
    """Sequences in one forward pass of one rank; the rest is accumulated. Lower it when memory runs out."""


class Optimizer(Settings):
    renamed: ClassVar = {"clip": "max_grad_norm"}

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` takes the hidden matrices; AdamW everything else."""
    lr: Annotated[float, Field(ge=0, le=1000)] = 6e-4
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 0.1
    """On hidden matrices and an untied head; never on norms, biases and embeddings."""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """A longer gradient is shortened to this; null leaves it."""
    parametrisation: Literal["standard", "mup"] = "standard"
    base_width: Positive | None = None
    """muP: the d_model at which lr was found."""
    base_head_dim: Positive | None = None
    """muP: the head_dim at which lr was found; null is the shape's own."""


class Evaluation(Settings):
    every: Steps | None = None
    """Validate every so many steps; always at the end."""
    tokens: Count | None = None
    """Whole documents up to so many tokens, the same ones each time; null is the whole corpus."""
    bytes: Count | None = None
    """The same by bytes of text, instead of `tokens`: the same documents under every tokenizer."""
    part: Part = "all"
    """`selection`: a third of the documents, drawn by hash, to choose settings by; `test`: the others."""


class Average(Settings):
    """Averaged weights, by `ema` or by `last`; see `entasis.train.averaging`."""

    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential average, over steps."""
    last: Positive | None = None
    """The mean of so many, `every` steps apart, up to the end of the stage."""
    every: Steps = "1%"


class Samples(Settings):
    """Texts that the model writes as it learns, into `metrics.jsonl` and TensorBoard."""

    every: Steps
    prompts: list[str] = Field(default_factory=lambda: [""], min_length=1)
    """An empty one begins a document."""
    tokens: Positive = 64
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """0 takes the likeliest token; else drawn by the recipe's seed, alike each time."""


class Checkpoint(Settings):
    every: Steps | None = "10%"
    keep_last: Positive = 2
    keep_every: Positive | None = None
    """Checkpoints at multiples of so many steps stay, with `model.safetensors` beside them."""


class Parallel(Settings):
    """How several processes (`torchrun`) share the work; one process alone holds the whole model."""

    kind: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """`ddp`: each holds the whole model. `fsdp`: each holds a share. `hsdp`: shares within a machine, copies across."""
    shard: Positive | None = None
    """hsdp: processes that share one copy; null is those of one machine."""


class Logging(Settings):
    tensorboard: bool = True
    wandb: bool = False


class Start(Settings):
    """Weights to begin with, instead of drawing them."""

    model_config = ConfigDict(populate_by_name=True)

    folder: str = Field(alias="from")
    """A finished run, one of its checkpoints that were kept (`checkpoint.keep_every`), or an imported model."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """`keep` goes on with the run's moments."""
    data_position: Literal["reset", "keep"] | None = None
    """`keep` goes on reading where the run stopped; null does as `optimizer_state`."""


class StageData(_Training):
    """What a stage trains on instead."""


class StageBatch(Settings):
    tokens: Count


class Lora(Settings):
    """Low-rank adapters beside frozen matrices (2106.09685), merged into them at the end of the stage."""

    rank: Annotated[int, Field(ge=1, le=4096)]
    alpha: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """The adapters' product is multiplied by alpha / rank; null is the rank."""
    on: str | list[str] = Field(default_factory=lambda: ["attention", "ffn"])
    """Selectors of the matrices that get one."""


class Anneal(Settings):
    """The learning rate of some parameters falls along half a cosine, beside what the schedule does to all."""

    on: str | list[str]
    """Selectors of them. Of several entries that mean a parameter the first counts."""
    part: Annotated[tuple[NotNegative, NotNegative], Field(strict=False)] = (0.0, 1.0)
    """The stage is this part of the half cosine, which is zero from 1 on: [0, 1] is all of it."""
    scale: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Where the half cosine begins, as a multiple of the rate."""


class Stage(Settings):
    """A stretch of training. What is null is taken from the recipe."""

    renamed: ClassVar = {"train": "trainable"}

    trainable: str | list[str] = "all"
    """What learns, in the language of `entasis.shape.selectors`: `all`, `blocks[2:].attention`, `not embedding`."""
    tokens: TokenCount | None = None
    """A number, or a share of the recipe's ("33%") in whole batches; the last stage may take what the others leave."""
    schedule: Schedule | None = None
    lr: Annotated[float, Field(ge=0, le=1000)] | None = None
    """Short for optimizer.lr."""
    optimizer: dict[str, Any] | None = None
    """Changes to the recipe's optimizer."""
    data: StageData | None = None
    sequence: Positive | None = None
    batch: StageBatch | None = None
    optimizer_state: Literal["reset", "keep"] | None = None
    """`keep` takes the moments over from the stage before; null does so after a growth (by the same optimizer), and
    resets otherwise. New layers have none."""
    warmup_new: Steps | None = None
    """Over so many steps the learning rate of the newest layers rises to the others'."""
    transition: dict[str, Any] | None = None
    """What turns the model of the stage before into this one's; see `entasis.grow.transitions`."""
    active_parameters: Count | None = None
    """Most parameters that may learn ("105M"); a stage that trains more is refused."""
    lora: Lora | None = None
    """Adapters learn too; `trainable` is then what learns beside them."""
    schedule_part: (
        Annotated[
            tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]],
            Field(strict=False),
        ]
        | None
    ) = None
    """The stage is this part of one schedule that runs over several stages ([0.2, 0.5]); null: it has one of its own."""
    anneal: Annotated[tuple[Anneal, ...], Field(strict=False)] = ()
    """Learning rates of their own, of some of what learns."""
    cache_frozen: bool = False
    """Keeps on disk what the frozen layers below the first that learns make of each window, for when it is read again."""


class Recipe(Settings):
    shape: dict[str, Any] | None = None
    """May be left out with `start`, whose shape it then is. A preset, a profile with a budget, or the explicit layer list; see `entasis.shape.specification`."""
    data: Data
    tokens: Count | None = None
    """Tokens to train on; may be left out when every stage has its own."""
    batch: BatchSize = BatchSize()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    init: Literal["independent", "nested"] = "independent"
    """`nested`: a narrow layer's initial values are the first heads and FFN units of a wider one's."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    attention: Literal["auto", "sdpa", "plain", "flex"] = "auto"
    device: str = "auto"
    parallel: Parallel = Parallel()
    activation_memory: Size | None = None
    """Most bytes ("8GiB") that the layers of one micro-batch may keep for the backward pass; the costliest layers
    go under activation checkpointing (are computed twice) to stay within it. Null keeps everything."""
    evaluation: Evaluation = Evaluation()
    average: Average | None = None
    samples: Samples | None = None
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    start: Start | None = None
    training_plan: dict[str, Any] | None = None
    """Which layers learn when, in shares; instead of `stages`. See `entasis.train.training_plans`."""
    stages: Annotated[tuple[Stage, ...], Field(strict=False)] = ()


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("entasis.train").joinpath("recipes")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def read(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, or a shipped one by its name, with `key=value` overrides (`optimizer.lr=1e-3`, `--tokens=5M`).

    Raises `UserError` for anything misspelt (with the nearest valid key), of the wrong type or out of range.
    """
    source: Any = {}
    if path is not None:
        file: Any = Path(path)
        advice = ""
        if str(path) in shipped() and not file.is_file():
            file = resources.files("entasis.train").joinpath("recipes", f"{path}.yaml")
        elif not Path(path).suffix:
            advice = f"; recipes that come along: {', '.join(shipped())}"
        source = read_yaml(file, f"recipe {path}", advice)
        if not isinstance(source, dict):
            raise UserError(f"recipe {path}: must be a mapping with shape:, data: and tokens:")
    for override in overrides:
        key, equals, value = override.removeprefix("--").partition("=")
        if not equals:
            raise UserError(f"override {override!r}: write key=value, as in optimizer.lr=1e-3")
        _assign(source, key, load_yaml(value, f"override {override!r}"))
    return from_dict(source)


def from_dict(source: Mapping[str, Any]) -> Recipe:
    """A recipe from a plain dictionary. Raises `UserError`."""
    if isinstance(data := source.get("data"), dict) and "train" not in data:
        raise UserError("recipe: data.train is missing; name a corpus folder made by `entasis data prepare`")
    if source.get("shape") is None and source.get("start") is None:
        raise UserError("recipe: shape is missing; draw one, or give start: {from: FOLDER}")
    return parse(Recipe, dict(source), "recipe")


def to_yaml(recipe: Recipe) -> str:
    """YAML that `read` reads back to an equal recipe; one line for each layer."""
    plain = recipe.model_dump(by_alias=True)
    plain["optimizer"]["betas"] = list(plain["optimizer"]["betas"])
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, width=110)


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
    flow = {"n_heads", "n_kv_heads", "d_ff"} <= set(data)
    return dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=flow)


_Dumper.add_representer(dict, _represent_mapping)
