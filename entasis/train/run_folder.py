"""A run's folder: begun, recognised, or refused; nothing in it is overwritten.

recipe.yaml  shape.json  environment.json  tokenizer.json  metrics.jsonl  checkpoints/  tensorboard/
model.safetensors  validation.safetensors  result.json        (when finished)
"""

from __future__ import annotations

import dataclasses
import errno
import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from entasis import files
from entasis.data import glyphs
from entasis.data.corpus import Corpus
from entasis.errors import Damaged, UserError
from entasis.grow import provenance
from entasis.model import weights
from entasis.shape.interfaces import Glyph
from entasis.shape.shapes import ModelShape
from entasis.train import auto_settings, checkpoint, parallel, preflight, stages
from entasis.train import device as devices
from entasis.train.environment import describe_environment
from entasis.train.recipe import (
    Recipe,
    held_out_of,
    mixture_of,
    to_yaml,
)
from entasis.train.resolved_recipe import ResolvedRecipe, SettledBatch, SettledRecipe, difference, read_stored
from entasis.train.timeline import Timeline

RESULT, ENVIRONMENT, LOCK = "result.json", "environment.json", ".lock"


@dataclass(frozen=True)
class OpenedFolder:
    """A folder ready for training: the recipe with nothing open, and where it was begun."""

    recipe: SettledRecipe
    shape: ModelShape
    notes: list[str]
    environment: dict[str, Any]
    result: dict[str, Any] | None
    """Of a run that is finished already."""
    checkpoint: Path | None = None
    """The one to go on from."""


@dataclass(frozen=True)
class _Found:
    """What a folder and a recipe say before the machine has been asked."""

    recipe: ResolvedRecipe
    settled: SettledRecipe | None
    """Of the run that is there already."""
    shape: ModelShape
    notes: list[str]
    corpus: Corpus | None


def open_run(
    recipe: Recipe, folder: Path, device: torch.device, held: ExitStack, *, resume: bool = True
) -> OpenedFolder:
    """Begins a run in `folder`, or recognises the same recipe there and goes on. Every rank calls it.

    Unless it is finished, the folder is locked until `held` closes. Raises `UserError` for a folder that holds another
    recipe or something else or is in use, for unusable data and for damaged files.
    """
    ours: list[_Found] = []
    """Of rank 0, with its corpus open."""

    def look() -> _Found:
        ours.append(_look(recipe, folder, device, held))
        return dataclasses.replace(ours[0], corpus=None)

    found: _Found = parallel.on_main(look)
    chosen, auto = found.settled, None
    if chosen is None:
        # All ranks time what is left to the machine: their steps wait for one another.
        chosen, auto = auto_settings.choose(found.recipe, found.shape, device)
    return parallel.on_main(lambda: _settle(ours[0], chosen, auto, folder, device, held, resume))


def _look(recipe: Recipe, folder: Path, device: torch.device, held: ExitStack) -> _Found:
    """Checks data, recipe and folder, and locks the folder unless the run is finished."""
    resolved, shape, notes, corpus = preflight.resolve_with_data(recipe)
    wanted = recognise(resolved, folder)
    if wanted is None:
        preflight.check_settings(resolved, device)
    if wanted is None or not (folder / RESULT).is_file():
        preflight.check_sharding(wanted or resolved)
        notes += lock(folder, held)
        # Another process may have begun it, or finished it, meanwhile.
        wanted = recognise(resolved, folder)
    resolved = wanted or draw_tokens(resolved, shape, corpus)
    return _Found(resolved, wanted, ModelShape.from_dict(resolved.shape), notes, corpus)


def _settle(
    found: _Found,
    wanted: SettledRecipe,
    auto: dict[str, Any] | None,
    folder: Path,
    device: torch.device,
    held: ExitStack,
    resume: bool,
) -> OpenedFolder:
    """Writes what a new run begins with, or finds where one there goes on. Raises `Damaged`."""
    corpus, shape, notes = found.corpus, found.shape, found.notes
    assert corpus is not None
    if found.settled is None:
        files.write_text(folder / "recipe.yaml", to_yaml(wanted), locked=True)
    environment = _environment(folder, corpus, wanted)
    if (folder / RESULT).is_file():
        try:
            result = files.read_json(folder / RESULT)
            return OpenedFolder(wanted, shape, doubts(folder, result), environment or {}, result)
        except Damaged as error:
            preflight.check_sharding(wanted)
            notes += lock(folder, held)
            last, _ = checkpoint.newest(folder)
            if last is None or not _is_last(last, wanted, shape):
                raise
            notes.append(f"{error}; it is made again from the checkpoint of the last step")
    last, said = checkpoint.newest(folder)
    if last is None and (folder / weights.WEIGHTS).is_file():
        raise Damaged(f"damaged: {folder} holds weights, but neither {RESULT} nor a checkpoint")
    if last is not None and not resume:
        raise UserError(f"{folder} holds a run at step {checkpoint.step_of(last)}")
    notes += said
    if environment is None:
        if last is not None:
            raise Damaged(
                f"damaged: {folder / ENVIRONMENT} is missing; restore it, or choose another --output"
            )
        environment = _begin(folder, wanted, shape, corpus, device, auto)
    _check_start(folder, wanted, environment)
    notes += _restore(folder, wanted, shape, corpus)
    return OpenedFolder(wanted, shape, notes, environment, None, last)


def recognise(resolved: ResolvedRecipe, folder: Path) -> SettledRecipe | None:
    """The recipe of the run in `folder`, None where one may begin. Raises `UserError` where another stands there."""
    stored_at = folder / "recipe.yaml"
    if not stored_at.is_file():
        if folder.is_dir() and {path.name for path in folder.iterdir()} - {LOCK, "recipe.yaml.partial"}:
            raise UserError(f"{folder} is not empty and holds no run; choose another --output")
        return None
    try:
        stored = read_stored(stored_at)
    except UserError as error:
        raise Damaged(f"damaged: {stored_at} is not the recipe that was written ({error})") from error
    settled = adopt(resolved, stored)
    # What only spreads the work or its memory is no part of what is computed: a run may go on elsewhere.
    free = {
        "parallel": settled.parallel,
        "activation_memory": settled.activation_memory,
        "batch": stored.batch.replaced(micro=settled.batch.micro),
    }
    if differs := difference(stored.replaced(**free), settled):
        raise UserError(f"{folder} holds a run of another recipe ({differs}); choose another --output")
    return settled


def draw_tokens(recipe: ResolvedRecipe, shape: ModelShape, corpus: Corpus) -> ResolvedRecipe:
    """The resolved recipe with the hash of the drawings of a glyph interface, which resuming keeps. Raises `UserError`."""
    if not isinstance(shape.interface, Glyph) or recipe.start is not None:
        return recipe
    interface = glyphs.settle(shape.interface, shape.vocabulary, corpus.tokenizer_path)
    return recipe.replaced(shape=dataclasses.replace(shape, interface=interface).to_dict())


def lock(folder: Path, held: ExitStack) -> list[str]:
    """Keeps other processes out of a run's folder until `held` closes or this one dies; returns what is to be said.

    Raises `UserError` where another is at work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(FileLock(folder / LOCK, timeout=0))
    except Timeout as error:
        raise UserError(
            f"{folder}: another `entasis train` is at work in this folder; wait for it, or choose another --output"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        return ["this file system has no locks: take care that no other `entasis train` uses the folder"]
    return []


def doubts(folder: Path, result: dict[str, Any]) -> list[str]:
    """What is missing from a finished run or was changed after it, one line for each file."""
    said = []
    for name, told in result.get("files", {}).items():
        if not (folder / name).is_file():
            said.append(f"damaged: {folder / name} is missing")
        elif told is not None and files.hash_of(folder / name) != told:
            said.append(f"damaged: {folder / name} was changed after the run")
    return said


def adopt(recipe: ResolvedRecipe, stored: SettledRecipe) -> SettledRecipe:
    """The recipe with each `auto` as it was settled when the run began, so that resuming changes nothing."""
    left = [n for n in ("precision", "compile", "attention", "device") if getattr(recipe, n) == "auto"]
    micro = stored.batch.micro if recipe.batch.micro == "auto" else recipe.batch.micro
    ours, theirs = (r.shape.get("interface", {}) for r in (recipe, stored))
    if ours.get("kind") == "glyph" and ours["bitmaps"] is None and "bitmaps" in theirs:
        ours = {**ours, "bitmaps": theirs["bitmaps"]}
        recipe = recipe.replaced(shape={**recipe.shape, "interface": ours})
    return recipe.narrowed(
        SettledRecipe,
        batch=recipe.batch.narrowed(SettledBatch, micro=micro),
        **{name: getattr(stored, name) for name in left},
    )


def _environment(folder: Path, corpus: Corpus, recipe: SettledRecipe) -> dict[str, Any] | None:
    """The run's `environment.json`, None where it is not written yet; refuses data that has changed since."""
    path = folder / ENVIRONMENT
    if not path.is_file():
        return None
    stored, data = files.read_json(path), _fingerprints(corpus, recipe)
    if changed := [name for name in data if stored.get("data", {}).get(name) != data[name]]:
        raise UserError(
            f"{folder}: the {changed[0]} data has changed since this run began; choose another --output"
        )
    return stored


def _fingerprints(corpus: Corpus, recipe: SettledRecipe) -> dict[str, str]:
    """Of the tokenizer and every corpus: `train`, `validation`, `train.NAME`, those of later stages by their paths."""
    train, held_out = recipe.data.train, recipe.data.validation
    named = {
        **{"train" if isinstance(train, str) else f"train.{n}": p.path for n, p in mixture_of(train).items()},
        **{
            n if isinstance(held_out, str) else f"validation.{n}": p for n, p in held_out_of(held_out).items()
        },
    }
    named |= {path: path for path in preflight.corpora_of(recipe) if path not in named.values()}
    fingerprints = {name: Corpus(path).fingerprint for name, path in named.items()}
    return {"tokenizer": corpus.tokenizer_hash, **fingerprints}


def _begin(
    folder: Path,
    recipe: SettledRecipe,
    shape: ModelShape,
    corpus: Corpus,
    device: torch.device,
    auto: dict[str, Any] | None,
) -> dict[str, Any]:
    """Writes `environment.json`, once."""
    environment = describe_environment(device) | {
        "precision": recipe.precision,
        "compile": recipe.compile,
        "attention": recipe.attention,
        "auto": auto,
        "busy": devices.is_busy(device),
        "matmul_flops_per_second": devices.measure_matmul_ceiling(device, recipe.precision),
        "distinct_layers": shape.distinct_layers,
        "data": _fingerprints(corpus, recipe),
    }
    if isinstance(shape.interface, Glyph) and recipe.start is None:
        environment["interface"] = glyphs.describe(shape.interface, shape, corpus.tokenizer_path)
    if recipe.start is not None:
        environment["start"] = {"from": recipe.start.folder, **_describe_start(recipe.start.folder)}
    return files.write_json(folder / ENVIRONMENT, environment, locked=True)


def _describe_start(start: str) -> dict[str, Any]:
    """What a run takes from the model that it starts from: weights, and the record of the layers, which says what is newest."""
    return {"weights": weights.fingerprint(start), "layers": provenance.read_rows(start)}


def _check_start(folder: Path, recipe: SettledRecipe, environment: dict[str, Any]) -> None:
    """Refuses to go on where another model stands by now where the run started from. Raises `UserError`."""
    if recipe.start is None:
        return
    told, start = environment.get("start", {}), recipe.start.folder
    if any(told.get(key, now) != now for key, now in _describe_start(start).items()):
        raise UserError(
            f"{folder}: the model in {start} has changed since this run began; put it back, or choose another --output"
        )


def _is_last(path: Path, recipe: SettledRecipe, shape: ModelShape) -> bool:
    """Whether a checkpoint is that of a run's last step, as far as what its plan measured tells."""
    timeline = Timeline(recipe, shape, checkpoint.state_of(path).get("measured") or [])
    return timeline.missing is None and checkpoint.step_of(path) == timeline.steps


def _restore(folder: Path, recipe: SettledRecipe, shape: ModelShape, corpus: Corpus) -> list[str]:
    """Writes `shape.json` and the tokenizer again where they are missing or damaged; returns a line for each that was damaged."""
    said = []
    # Killed at its end, a run has the shape of its last stage beside its weights.
    shapes = [shape, stages.lay_out(recipe, shape)[-1].shape]
    contents = {
        weights.SHAPE: [(json.dumps(x.to_dict(), indent=1) + "\n").encode() for x in shapes],
        weights.TOKENIZER: [corpus.tokenizer_path.read_bytes()],
    }
    for name, sound in contents.items():
        path = folder / name
        if path.is_file() and path.read_bytes() in sound:
            continue
        if path.is_file():
            said.append(f"damaged: {path}; it is made again")
        files.write_bytes(path, sound[0], locked=True)
    return said
