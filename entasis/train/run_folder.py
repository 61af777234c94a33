"""A run's folder: begun, recognised, or refused; nothing in it is overwritten.

recipe.yaml  shape.json  environment.json  tokenizer.json  metrics.jsonl  checkpoints/  tensorboard/
model.safetensors  validation.safetensors  result.json        (when finished)
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from entasis.data.corpus import Corpus
from entasis.data.doctor import examine
from entasis.errors import UserError
from entasis.shape.shapes import ModelShape
from entasis.train import auto_settings, checkpoint, hardware, parallel
from entasis.train.recipe import Recipe, difference, read, resolve, to_yaml


@dataclass(frozen=True)
class Run:
    """A folder ready for training: the recipe with nothing open, and where it was begun."""

    recipe: Recipe
    shape: ModelShape
    notes: list[str]
    environment: dict[str, Any]
    result: dict[str, Any] | None
    """Of a run that is finished already."""


@dataclass(frozen=True)
class _Found:
    """What a folder and a recipe say before the machine has been asked."""

    recipe: Recipe
    shape: ModelShape
    notes: list[str]
    corpus: Corpus | None
    is_new: bool


def open_run(recipe: Recipe, folder: Path, device: torch.device, *, resume: bool = True) -> Run:
    """Begins a run in `folder`, or recognises the same recipe there and goes on. Every rank calls it.

    Raises `UserError` for a folder that holds another recipe or something else, and for unusable data.
    """
    ours = _look(recipe, folder, device, resume=resume) if parallel.is_main() else None
    found = parallel.agree(dataclasses.replace(ours, corpus=None) if ours else None)
    assert found is not None
    chosen, auto = found.recipe, None
    if found.is_new:
        # All ranks time what is left to the machine: their steps wait for one another.
        chosen, auto = choose(found.recipe, found.shape, device)
    run = None
    if ours:
        assert ours.corpus is not None
        if ours.is_new:
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / "recipe.yaml", to_yaml(chosen))
        result = None
        if (folder / "result.json").is_file():
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        environment = _environment(folder, chosen, found.shape, ours.corpus, device, auto)
        run = Run(chosen, found.shape, found.notes, environment, result)
    run = parallel.agree(run)
    assert run is not None
    return run


def _look(recipe: Recipe, folder: Path, device: torch.device, *, resume: bool) -> _Found:
    corpus = check_data(recipe)
    resolved, shape, notes = resolve(recipe, corpus.vocabulary)
    check_vocabulary(shape, corpus)
    stored_at = folder / "recipe.yaml"
    if stored_at.is_file():
        stored = read(stored_at)
        resolved = adopt(resolved, stored)
        # What only spreads the work or its memory is no part of what is computed: a run may go on elsewhere.
        free = {"parallel": resolved.parallel, "activation_memory": resolved.activation_memory}
        if differs := difference(dataclasses.replace(stored, **free), resolved):  # type: ignore[arg-type]
            raise UserError(f"{folder} holds a run of another recipe ({differs}); choose another --output")
        finished = (folder / "result.json").is_file()
        if checkpoint.folders(folder) and not resume and not finished:
            raise UserError(
                f"{folder} holds a run at step {checkpoint.step_of(checkpoint.folders(folder)[-1])}"
            )
        return _Found(resolved, shape, notes, corpus, is_new=False)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no run; choose another --output")
    check_settings(resolved, device)
    return _Found(resolved, shape, notes, corpus, is_new=True)


def check_data(recipe: Recipe) -> Corpus:
    """Opens and examines both corpora; returns the one to train on. Raises `UserError`."""
    corpus = Corpus(recipe.data.train)
    corpora = {recipe.data.train: corpus}
    if recipe.data.validation is not None:
        held_out = corpora[recipe.data.validation] = Corpus(recipe.data.validation)
        if held_out.tokenizer_hash != corpus.tokenizer_hash:
            raise UserError(
                f"data: {recipe.data.validation} was made with another tokenizer than {recipe.data.train}; "
                "prepare both with the same tokenizer.json"
            )
    for path, opened in corpora.items():
        if danger := opened.danger:
            if recipe.data.dangerous:
                continue
            raise UserError(
                f"data: {path} was spoilt on purpose ({danger}); data.dangerous=true trains on it all the same"
            )
        diagnosis = examine(path)
        if not diagnosis.sound:
            worst = diagnosis.findings[0]
            raise UserError(f"data: {path} is diseased: {worst.name}: {worst.evidence}; {worst.cure}")
    if corpus.tokens < recipe.data.sequence + 1:
        raise UserError(
            f"data: {recipe.data.train} has {corpus.tokens} tokens, "
            f"fewer than data.sequence {recipe.data.sequence} + 1"
        )
    return corpus


def check_vocabulary(shape: ModelShape, corpus: Corpus) -> None:
    """The shape's vocabulary is the corpus's, or that padded by less than 128. Raises `UserError`."""
    if not corpus.vocabulary <= shape.vocabulary < corpus.vocabulary + 128:
        raise UserError(
            f"shape: vocabulary is {shape.vocabulary}, but the tokenizer has {corpus.vocabulary} ids; "
            f"set shape.vocabulary={corpus.vocabulary}, or prepare the corpus with the matching tokenizer"
        )


def adopt(recipe: Recipe, stored: Recipe) -> Recipe:
    """Leaves to the machine nothing that was settled when the run began: resuming changes nothing."""
    result = dataclasses.replace(recipe, batch=dataclasses.replace(recipe.batch))
    for name in ("precision", "compile", "attention", "device"):
        if getattr(recipe, name) == "auto":
            setattr(result, name, getattr(stored, name))
    if recipe.batch.micro == "auto":
        result.batch.micro = stored.batch.micro
    return result


def check_settings(recipe: Recipe, device: torch.device) -> None:
    """Refuses settings that this machine cannot run with. Raises `UserError`."""
    if recipe.logging.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "recipe: logging.wandb is true, but wandb is not installed: pip install 'entasis[wandb]'"
        )
    if recipe.compile is True and not hardware.has_compiler(device):
        raise UserError(
            "recipe: compile is true, but there is no C++ compiler (g++ or clang++); use compile=false"
        )
    if recipe.attention == "flex" and (
        device.type != "cuda" or recipe.compile is not True or parallel.world() > 1
    ):
        raise UserError(
            "recipe: attention is flex, which trains on CUDA, compiled (compile=true) and in one process only; "
            "use auto"
        )


def with_device(recipe: Recipe, device: torch.device) -> Recipe:
    """A resolved recipe with its device and the sequences of a micro-batch settled."""
    result = dataclasses.replace(recipe, batch=dataclasses.replace(recipe.batch))
    if recipe.device == "auto":
        result.device = device.type
    if recipe.batch.micro == "auto":
        # On a CPU more than this falls out of its caches: a quarter slower at twice as many tokens.
        at_once = 32_768 if device.type == "cuda" else 4_096
        result.batch.micro = max(1, min(recipe.sequences, at_once // recipe.data.sequence))
    return result


def choose(recipe: Recipe, shape: ModelShape, device: torch.device) -> tuple[Recipe, dict[str, Any] | None]:
    """A resolved recipe with the machine's part filled in, and the timings behind it. Every rank calls it."""
    return auto_settings.choose(with_device(recipe, device), shape, device)


def write(path: Path, text: str) -> None:
    """Writes a file whole: aside, synced, renamed."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    checkpoint.sync(path.parent)


def _environment(
    folder: Path,
    recipe: Recipe,
    shape: ModelShape,
    corpus: Corpus,
    device: torch.device,
    auto: dict[str, Any] | None,
) -> dict[str, Any]:
    """The run's `environment.json`, written once; refuses data that has changed since."""
    path = folder / "environment.json"
    data = {"train": corpus.fingerprint, "tokenizer": corpus.tokenizer_hash}
    if recipe.data.validation is not None:
        data["validation"] = Corpus(recipe.data.validation).fingerprint
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name in data if stored["data"].get(name) != data[name]]:
            raise UserError(
                f"{folder}: the {changed[0]} data has changed since this run began; choose another --output"
            )
        return dict(stored)
    environment = hardware.environment(device) | {
        "precision": recipe.precision,
        "compile": recipe.compile,
        "attention": recipe.attention,
        "auto": auto,
        "matmul_flops_per_second": hardware.matmul_ceiling(device, recipe.precision),
        "distinct_layers": shape.distinct_layers,
        "data": data,
    }
    write(folder / "shape.json", json.dumps(shape.to_dict(), indent=1) + "\n")
    if not (folder / "tokenizer.json").exists():
        shutil.copyfile(corpus.tokenizer_path, folder / "tokenizer.json.partial")
        (folder / "tokenizer.json.partial").replace(folder / "tokenizer.json")
    write(path, json.dumps(environment, indent=1) + "\n")
    return environment
