"""The tokenizer of a checkpoint: `tokenizer.json`, for the chat template `tokenizer_config.json`, and where answers end.

transformers stops at the `eos_token_id` of generation_config.json, of which a chat model has several, or else at that of
config.json. We keep a generation_config.json of that one key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from entasis.data.tokenizer import Tokenizer, from_gpt2, load
from entasis.errors import UserError
from entasis.interop.config_reader import shorten
from entasis.interop.hf_folder import find_member, read_json

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class TokenizerFiles:
    """File name → content of what goes beside the weights; empty where there is no tokenizer."""

    contents: dict[str, bytes] = field(default_factory=dict)
    chat_template: bool = False
    notes: tuple[str, ...] = ()
    sources: tuple[Path, ...] = ()
    """The files that were read."""


def read_given(path: Path) -> bytes:
    """The tokenizer.json that the user named."""
    if not path.is_file():
        raise UserError(f"{path}: is not a tokenizer.json")
    read_json(path)
    return path.read_bytes()


def read_folder(folder: Path, family: str, given: Path | None = None) -> TokenizerFiles:
    """The tokenizer of a Hugging Face folder, its tokenizer.json replaced by the `given` one, if there is one.

    A chat template of its own file is put into the config.

    Old GPT-2 checkpoints have a vocabulary and merges instead of a tokenizer.json; it is made of them. Other
    families' merges do not say how text is split before merging.
    """
    if given is not None:
        sources, content = [given], read_given(given)
    elif (folder / "tokenizer.json").exists():
        sources = [find_member(folder, "tokenizer.json")]
        content = sources[0].read_bytes()
    elif family == "gpt2" and (folder / "vocab.json").exists():
        sources = [find_member(folder, "vocab.json"), find_member(folder, "merges.txt")]
        content = from_gpt2(*sources).library.to_str().encode()
    else:
        return TokenizerFiles(notes=("the source has no tokenizer.json; give one with --tokenizer",))
    config: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").exists():
        sources.append(find_member(folder, "tokenizer_config.json"))
        config = dict(read_json(sources[-1]))
        config.pop("auto_map", None)  # names code to run; ours runs none
    if (folder / "chat_template.jinja").exists():
        sources.append(find_member(folder, "chat_template.jinja"))
        config["chat_template"] = _text(sources[-1])
    return with_config(content, config, sources)


def with_config(
    tokenizer: bytes, config: Mapping[str, Any], sources: Sequence[Path] = (), ends: Sequence[int] = ()
) -> TokenizerFiles:
    """`tokenizer.json` with its `tokenizer_config.json`, if that says anything, and the ids in `ends`, which end an answer."""
    contents = {"tokenizer.json": tokenizer}
    if config:
        encoded = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        contents["tokenizer_config.json"] = encoded.encode("utf-8", "surrogatepass")
    if ends:
        contents[GENERATION] = _generation(ends)
    return TokenizerFiles(contents, chat_template=bool(config.get("chat_template")), sources=tuple(sources))


def with_generation_ends(files: TokenizerFiles, folder: Path, config: Mapping[str, Any]) -> TokenizerFiles:
    """The files with what ends an answer by the settings of a Hugging Face folder, whose config.json is `config`.

    Raises `UserError` for settings that name no ids.
    """
    if "tokenizer.json" not in files.contents:
        return files
    where, found, sources = "config.json", config.get("eos_token_id"), files.sources
    if (folder / GENERATION).exists():
        sources = (*sources, find_member(folder, GENERATION))
        if (told := read_json(sources[-1]).get("eos_token_id")) is not None:
            where, found = GENERATION, told
    if not (ends := _ids(found, where)):
        return files
    return replace(files, contents={**files.contents, GENERATION: _generation(ends)}, sources=sources)


def _generation(ends: Sequence[int]) -> bytes:
    return (json.dumps({"eos_token_id": list(ends)}) + "\n").encode()


def read_generation_ends(folder: Path) -> tuple[int, ...]:
    """The ids that end an answer by a folder's generation_config.json, none where it has none. Raises `UserError`."""
    path = folder / GENERATION
    return _ids(read_json(path).get("eos_token_id"), str(path)) if path.is_file() else ()


def _ids(found: Any, where: str) -> tuple[int, ...]:
    """One id, several, or none."""
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(i) is not int for i in ids):
        raise UserError(f"{where}: eos_token_id is {shorten(repr(found))}; it must be an id or a list of ids")
    return tuple(ids)


@dataclass(frozen=True)
class Ends:
    """The ids of the tokens around a text, each None where there is none."""

    begin: int | None = None
    end: int | None = None
    """Ends an answer; of a chat model often another than that of a document."""
    document: int | None = None
    others: tuple[int, ...] = ()
    """What else ends an answer by the settings of the model it was imported from."""

    @property
    def stops(self) -> int | list[int] | None:
        """What generation stops at, as transformers writes it."""
        ids = [i for i in dict.fromkeys((self.end, self.document, *self.others)) if i is not None]
        return ids if len(ids) > 1 else self.end


def read_ends(folder: Path, tokenizer: Tokenizer | None = None) -> Ends:
    """The `bos_token` and `eos_token` of a folder's tokenizer_config.json, else what ends a document in its tokenizer.

    Where neither says what ends an answer, it is the first id of generation_config.json.
    `tokenizer` is the folder's, where it is open. Raises `UserError` where one of the files cannot be read.
    """
    if not (folder / "tokenizer.json").is_file():
        return Ends()
    tokenizer, config = tokenizer or load(folder / "tokenizer.json"), read_config(folder)
    ids = tokenizer.library.get_vocab(with_added_tokens=True)

    def find(name: str) -> int | None:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        return ids.get(text, tokenizer.end_of_text) if isinstance(text, str) else tokenizer.end_of_text

    others = read_generation_ends(folder)
    end = find("eos_token")
    end = next(iter(others), None) if end is None else end
    return Ends(find("bos_token"), end, tokenizer.end_of_text, others)


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's tokenizer_config.json, empty where there is none. Raises `UserError` where it is damaged."""
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def check_vocabulary(files: TokenizerFiles, rows: int) -> None:
    """Raises `UserError` when the tokenizer cannot be read or has an id that the embedding has no row for."""
    if "tokenizer.json" not in files.contents:
        return
    from tokenizers import Tokenizer

    try:
        vocabulary = Tokenizer.from_buffer(files.contents["tokenizer.json"]).get_vocab(with_added_tokens=True)
    except BaseException as error:
        # tokenizers raises bare Exception, and a Rust panic, which is none, for some damaged files.
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise UserError(f"tokenizer.json: cannot be read ({' '.join(str(error).split())[:120]})") from None
    if not vocabulary:
        raise UserError("tokenizer.json: has no tokens")
    token, highest = max(vocabulary.items(), key=lambda item: item[1])
    if highest >= rows:
        raise UserError(
            f"tokenizer.json: token {shorten(token)!r} is number {highest}, but the embedding has only {rows} rows; "
            "the tokenizer belongs to another model"
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path.name}: is not UTF-8 text") from None
