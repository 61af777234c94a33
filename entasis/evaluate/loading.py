"""Any model by its path: a finished run, an imported model, a Hugging Face folder, a GGUF file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from entasis import files
from entasis.data.tokenizer import Tokenizer
from entasis.data.tokenizer import load as load_tokenizer
from entasis.errors import Damaged, UserError
from entasis.evaluate import chat
from entasis.evaluate.chat import Chat
from entasis.evaluate.generation import Sampling, generate
from entasis.interop.hf_tokenizer import GENERATION, read_ends, read_generation_ends
from entasis.model import weights
from entasis.model.transformer import Transformer
from entasis.shape.shapes import ModelShape


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer and its chat template (None where none came along)."""

    model: Transformer
    tokenizer: Tokenizer | None
    chat: Chat | None = None
    ends: tuple[int, ...] = ()
    """Ids that end an answer by the settings of the model it was imported from."""
    recipe: Path | None = None
    """Of the run that it comes from; None where it comes from elsewhere."""
    prefix: tuple[int, ...] = ()
    """Ids that stand in front of every text: those of its tokenizer, but for a model trained here from the start, on
    corpora that are made without."""
    first: int | None = None
    """Stands before a text where nothing else does."""

    @property
    def shape(self) -> ModelShape:
        return self.model.shape

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def stop(self) -> set[int]:
        """Ids that end a text: the tokenizer's end of text, and what the model's own settings say ends one."""
        if self.tokenizer is None:
            return set(self.ends)
        named = self.chat.special.get("eos_token") if self.chat else None
        ids = [self.tokenizer.end_of_text, self.tokenizer.library.token_to_id(named) if named else None]
        return {i for i in (*ids, *self.ends) if i is not None}

    @property
    def document_masking(self) -> bool:
        """Whether it was trained with attention inside documents alone. Raises `Damaged`."""
        if self.recipe is None:
            return False
        masked = _read(self.recipe, "data", "document_masking")
        if not isinstance(masked, bool):
            raise Damaged(
                f"damaged: {self.recipe} does not say data.document_masking; "
                "give --document-masking or --no-document-masking"
            )
        return masked

    def encode(self, text: str | Iterable[int]) -> list[int]:
        """Ids of a text behind `prefix`, if it does not begin with that; ids are returned as they are.

        Raises `UserError` without a tokenizer.
        """
        if not isinstance(text, str):
            return [int(i) for i in text]
        if self.tokenizer is None:
            raise UserError("the model has no tokenizer.json; give ids instead of text")
        ids, prefix = self.tokenizer.encode(text), list(self.prefix)
        return ids if ids[: len(prefix)] == prefix else prefix + ids

    @torch.no_grad()
    def logits(self, text: str | Iterable[int]) -> torch.Tensor:
        """fp32 logits [tokens, vocabulary]: row t is the model's opinion on the token after t."""
        return self.model(torch.tensor([self.encode(text)], device=self.device))[0].float()

    @torch.no_grad()
    def hidden_states(self, text: str | Iterable[int]) -> torch.Tensor:
        """The fp32 residual stream [layers + 1, tokens, d_model]: in front of each layer, and after the last."""
        states = self.model.hidden_states(torch.tensor([self.encode(text)], device=self.device))
        return torch.cat(states).float()

    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]] | np.ndarray | torch.Tensor,
        *,
        tokens: int = 128,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
    ) -> str | list[int] | list[str] | list[list[int]]:
        """The continuation of a prompt: text for text, ids for ids; of a list of prompts, read together, a list.

        Ids may be any sequence of whole numbers, an array and a tensor too.
        Choosing greedily (temperature 0), a prompt is continued as it would be alone.
        """
        first: Any = prompt[0] if len(prompt) else 0
        alone = isinstance(prompt, str) or (not isinstance(first, str) and np.ndim(first) == 0)
        prompts: list[Any] = [prompt] if alone else list(prompt)
        sampling = Sampling(temperature, top_k, top_p, min_p, seed)
        ids: list[list[int]] = [[] for _ in prompts]
        encoded = [self.encode(p) for p in prompts]
        for step in generate(self.model, encoded, tokens=tokens, sampling=sampling, stop=self.stop):
            for answer, token in zip(ids, step, strict=True):
                if token is not None:
                    answer.append(token)
        answers: list[Any] = [
            self.tokenizer.continuation(begun, answer) if isinstance(p, str) and self.tokenizer else answer
            for p, begun, answer in zip(prompts, encoded, ids, strict=True)
        ]
        return answers[0] if alone else answers

    def save(self, folder: str | Path) -> None:
        """Writes a new folder that `load` and every command open: weights, shape, tokenizer, chat template.

        Raises `UserError` for a folder that is not empty.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is not empty; name another folder")
        with files.new_folder(folder) as partial:
            if self.tokenizer is not None:
                self.tokenizer.save(partial / weights.TOKENIZER)
            if self.chat is not None:
                told = {"chat_template": self.chat.template, **self.chat.special}
                files.write_text(partial / "tokenizer_config.json", json.dumps(told, indent=1), locked=True)
            if self.ends:
                ends = {"eos_token_id": list(self.ends)}
                files.write_text(partial / GENERATION, json.dumps(ends) + "\n", locked=True)
            weights.save(self.model, partial)


def choose_device(name: str) -> str:
    """`name` as torch calls it; `auto` is CUDA where there is one. Raises `UserError` for what is not here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
    except RuntimeError:
        chosen = torch.device("meta")
    known = ("cpu", "cuda", "mps") if torch.backends.mps.is_available() else ("cpu", "cuda")
    if chosen.type not in known:
        raise UserError(f"--device is {name!r}; it must be auto, cpu, cuda or cuda:0")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        here = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "no CUDA device"
        raise UserError(f"--device is {name}; this machine, or this torch, has {here}")
    return name


def _only_gguf(path: Path) -> Path:
    """The GGUF file of a folder that holds one model as GGUF; any other path as it is. Raises `UserError`."""
    if not path.is_dir() or any((path / name).is_file() for name in ("shape.json", "config.json")):
        return path
    # Of a model in parts the first part stands for all.
    found = sorted(p for p in path.glob("*.gguf") if "-of-" not in p.stem or "-00001-of-" in p.stem)
    if len(found) > 1:
        raise UserError(
            f"{path}: holds {len(found)} GGUF files; name one: {', '.join(p.name for p in found)}"
        )
    return found[0] if found else path


def _read(recipe: Path, *keys: str) -> Any:
    """What a run's recipe says under these keys, None where it cannot be read."""
    try:
        found = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        for key in keys:
            found = found[key]
        return found
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        return None


def load(path: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Loaded:
    """Opens a model. Hugging Face folders and GGUF files are imported into a temporary folder first.

    `device` is cpu, cuda, cuda:N, or auto for the first of CUDA and the CPU that is there. Raises `UserError` for what
    is no model, one that cannot be imported, and a device that is not here.
    """
    path, device = _only_gguf(Path(path)), choose_device(device)
    if (path / "shape.json").is_file():
        model = weights.load(path, device=device, dtype=dtype)
        home = weights.home_of(path)
        named, recipe = home / weights.TOKENIZER, home / "recipe.yaml"
        tokenizer = load_tokenizer(named) if named.is_file() else None
        from_scratch = recipe.is_file() and _read(recipe, "start") is None
        return Loaded(
            model.eval(),
            tokenizer,
            chat.load(home),
            read_generation_ends(home),
            recipe if recipe.is_file() else None,
            () if tokenizer is None or from_scratch else tuple(tokenizer.prefix),
            read_ends(home, tokenizer).begin,
        )
    if (path / "config.json").is_file() or path.suffix == ".gguf":
        from entasis.interop.importing import import_model

        with tempfile.TemporaryDirectory() as folder:
            import_model(path, Path(folder) / "model")
            loaded = load(Path(folder) / "model", device=device, dtype=dtype)
            # safetensors maps the file; what is mapped must not outlive the folder.
            loaded.model.load_state_dict(
                {k: v.clone() for k, v in loaded.model.state_dict().items()}, assign=True
            )
            return loaded
    if (path / "result.json").is_file():
        raise Damaged(f"damaged: {path / 'shape.json'} is missing")
    if (path / "recipe.yaml").is_file():
        raise UserError(f"{path}: the run is not finished; give the same `entasis train` command again")
    raise UserError(
        f"{path}: no model here; name a finished run, an imported model, a Hugging Face folder or a GGUF file"
    )
