"""What a recipe can get wrong that its file does not show: data, tokenizers, and what this machine can do.

Everything here is asked before the first step, for every stage.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

from entasis.data.corpus import Corpus
from entasis.data.doctor import examine
from entasis.data.held_out import choose_documents
from entasis.data.mixture import whole_shares
from entasis.data.tokenizer import load as load_tokenizer
from entasis.errors import UserError
from entasis.model import weights
from entasis.shape.shapes import ModelShape
from entasis.train import device as devices
from entasis.train import moments, parallel
from entasis.train.recipe import Recipe, Stage, WeightedCorpus, held_out_of, mixture_of
from entasis.train.resolve import resolve
from entasis.train.resolved_recipe import ResolvedRecipe
from entasis.train.stages import lay_out
from entasis.train.training_data import TrainingData, weighed, weights_of


def resolve_with_data(recipe: Recipe) -> tuple[ResolvedRecipe, ModelShape, list[str], Corpus]:
    """The recipe resolved, its shape and notes (see `resolve`), and the first corpus to train on, once all are examined.

    Raises `UserError`.
    """
    recipe = weighed(recipe)
    corpus = check_data(recipe)
    resolved, shape, notes = resolve(recipe, corpus.vocabulary)
    _check_vocabulary(shape, corpus)
    _check_samples(resolved, shape, corpus)
    _check_start(resolved, shape)
    return resolved, shape, notes, corpus


def check_data(recipe: Recipe) -> Corpus:
    """Opens and examines all corpora, those of later stages too; returns the first one to train on. Raises `UserError`."""
    corpora = {path: Corpus(path) for path in corpora_of(recipe)}
    first, corpus = next(iter(corpora.items()))
    for path, other in corpora.items():
        if other.tokenizer_hash != corpus.tokenizer_hash:
            raise UserError(
                f"data: {path} was made with another tokenizer than {first}; "
                "prepare both with the same tokenizer.json"
            )
    if recipe.start is not None:
        tokenizer = _tokenizer_of(Path(recipe.start.folder))
        if load_tokenizer(tokenizer).hash != corpus.tokenizer_hash:
            raise UserError(
                f"data: {first} was made with another tokenizer than the model in {recipe.start.folder} "
                f"has; prepare it with --tokenizer {tokenizer}"
            )
    for path, opened in corpora.items():
        if corruption := opened.corruption:
            if recipe.data.allow_corruption:
                continue
            raise UserError(
                f"data: {path} was corrupted on purpose ({corruption}); data.allow_corruption=true trains on it all the same"
            )
        diagnosis = examine(path)
        if not diagnosis.sound:
            # What the doctor concludes from the ids may be wrong; that the tokenizer is another one or gone is not.
            if not recipe.data.allow_corruption or (
                load_tokenizer(opened.tokenizer_path).hash != opened.tokenizer_hash
            ):
                worst = diagnosis.findings[0]
                raise UserError(f"data: {path} is corrupt: {worst.name}: {worst.evidence}; {worst.fix}")
            if parallel.is_main_process():
                found = "; ".join(f"{finding.name}: {finding.evidence}" for finding in diagnosis.findings)
                print(f"note: data.allow_corruption: {path} is trained on despite {found}", file=sys.stderr)
    for opened in corpora.values():
        opened.verify()
    for path in held_out_of(recipe.data.validation).values():
        choose_documents(corpora[path], part=recipe.evaluation.part)
    for index, stage in enumerate(recipe.stages or (Stage(),)):
        mixed = mixture_of((stage.data or recipe.data).train)
        sequence = stage.sequence or recipe.data.sequence
        for part in mixed.values():
            if corpora[part.path].tokens < sequence + 1:
                raise UserError(
                    f"data: {part.path} has {corpora[part.path].tokens} tokens, fewer than data.sequence {sequence} + 1"
                )
        _check_mixture(
            mixed, corpora, f"recipe: stages[{index}].data.train" if stage.data else "recipe: data.train"
        )
    return corpus


def _check_mixture(mixed: dict[str, WeightedCorpus], corpora: dict[str, Corpus], where: str) -> None:
    """Refuses weights that cannot be followed, and a text that is named twice. Raises `UserError`."""
    seen: dict[str, str] = {}
    for name, part in mixed.items():
        other = seen.setdefault(corpora[part.path].fingerprint, name)
        if other != name:
            raise UserError(f"{where}: {other} and {name} are the same text; name it once, with one weight")
    try:
        whole_shares(dict(zip(mixed, weights_of(mixed), strict=True)))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _tokenizer_of(start: Path) -> Path:
    """The tokenizer of a model to start from; a checkpoint's is its run's. Raises `UserError`."""
    tokenizer = weights.home_of(start) / weights.TOKENIZER
    if not (start / weights.WEIGHTS).is_file() or not tokenizer.is_file():
        raise UserError(
            f"recipe: start.from is {start}, which holds no model; name a finished run, a checkpoint that was kept "
            "(checkpoint.keep_every), or an imported model"
        )
    return tokenizer


def corpora_of(recipe: Recipe) -> dict[str, None]:
    """Every corpus that a recipe names, once, the first to train on first."""
    texts = [recipe.data.train, *(stage.data.train for stage in recipe.stages if stage.data)]
    trained_on = [part.path for text in texts for part in mixture_of(text).values()]
    return dict.fromkeys([*trained_on, *held_out_of(recipe.data.validation).values()])


def _check_vocabulary(shape: ModelShape, corpus: Corpus) -> None:
    """The shape's vocabulary is the corpus's, or that padded by less than 128. Raises `UserError`."""
    if not corpus.vocabulary <= shape.vocabulary < corpus.vocabulary + 128:
        raise UserError(
            f"shape: vocabulary is {shape.vocabulary}, but the tokenizer has {corpus.vocabulary} ids; "
            f"set shape.vocabulary={corpus.vocabulary}, or prepare the corpus with the matching tokenizer"
        )


def _check_samples(recipe: ResolvedRecipe, shape: ModelShape, corpus: Corpus) -> None:
    """Refuses samples longer than the positions that the model learns. Raises `UserError`."""
    samples = recipe.samples
    if samples is None or shape.positions != "learned":
        return
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    longest = max(len(tokenizer.encode(text)) or 1 for text in samples.prompts) + samples.tokens
    if longest > shape.context:
        raise UserError(
            f"recipe: samples are {longest} tokens long with their prompt; the model learns positions for {shape.context}"
        )


def _check_start(recipe: ResolvedRecipe, shape: ModelShape) -> None:
    """Refuses to keep moments of another optimizer, and a place in data that is read otherwise. Raises `UserError`."""
    start = recipe.start
    if start is None or "keep" not in (start.optimizer_state, start.data_position):
        return
    folder = Path(start.folder)
    keys, positions = moments.describe(folder)
    spans = lay_out(recipe, shape)
    if start.optimizer_state == "keep":
        muon = spans[0].optimizer.name == "muon"
        if ("momentum_buffer" in keys) != muon:
            raise UserError(
                f"recipe: start.optimizer_state is keep, but the moments in {folder} are of another optimizer than "
                f"{spans[0].optimizer.name}; use reset"
            )
    if (start.data_position or start.optimizer_state) == "keep":
        places = TrainingData(spans[0].data, recipe.seed, {}).places
        if positions and not positions.keys() & set(places):
            raise UserError(
                f"recipe: the data's place is kept, but {folder} has none in this text at sequence "
                f"{spans[0].data.sequence}; set start.data_position=reset"
            )


def check_sharding(recipe: Recipe) -> None:
    """Refuses stages that so many processes cannot share, which may be more than before. Raises `UserError`."""
    for stage in recipe.stages or (Stage(),):
        tokens = (stage.batch or recipe.batch).tokens
        sequences = tokens // (stage.sequence or recipe.data.sequence)
        if sequences % parallel.world():
            raise UserError(
                f"recipe: batch.tokens {tokens} is {sequences} sequences, which {parallel.world()} processes cannot share equally"
            )
    if recipe.parallel.kind != "ddp" and parallel.world() > 1:
        for stage in recipe.stages:
            if stage.lora or stage.cache_frozen:
                key = "lora" if stage.lora else "cache_frozen"
                raise UserError(f"recipe: {key} needs every process to hold the whole model (ddp)")


def check_settings(recipe: Recipe, device: torch.device) -> None:
    """Refuses settings that this machine cannot run with. Raises `UserError`."""
    if recipe.logging.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "recipe: logging.wandb is true, but wandb is not installed: pip install 'entasis[wandb]'"
        )
    if any(stage.lora for stage in recipe.stages) and importlib.util.find_spec("peft") is None:
        raise UserError("recipe: a stage has lora, but peft is not installed: pip install 'entasis[lora]'")
    if recipe.compile is True and not devices.has_compiler(device):
        raise UserError(
            "recipe: compile is true, but there is no C++ compiler (g++ or clang++), or on a GPU no Triton; use compile=false"
        )
    if recipe.attention == "flex" and (
        device.type != "cuda" or recipe.compile is not True or parallel.world() > 1
    ):
        raise UserError(
            "recipe: attention is flex, which trains on CUDA, compiled (compile=true) and in one process only; "
            "use auto"
        )
    check_sharding(recipe)
    if recipe.attention == "flex" and any(stage.cache_frozen for stage in recipe.stages):
        raise UserError(
            "recipe: attention is flex, which is compiled, and a stage has cache_frozen, which runs eager"
        )
