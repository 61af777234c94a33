"""`tokenizer.json` and the `tokenizer.ggml.*` keys of a GGUF file: read at import, written at export.

GGUF keeps the pieces and scores of a SentencePiece BPE, which say all there is, and the vocabulary and
merges of a byte-level BPE, but only the *name* of how text is split before merging. The patterns here are those of the
models' own tokenizer.json; llama.cpp's regular expressions differ from them in runs of blanks. A name that is not known
gives no tokenizer rather than a nearly right one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from entasis.errors import UserError
from entasis.interop.gguf_reader import GGUFFile, Strings
from entasis.interop.hf_tokenizer import TokenizerFiles, read_config, read_ends, read_given, with_config

if TYPE_CHECKING:
    import gguf
from entasis.interop.config_reader import ConfigReader, shorten

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_then_gpt2() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(numbers: str) -> Any:
    pattern = Regex(f"{_CONTRACTIONS}|{numbers}|{_REST}")
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(pattern, behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip


_QWEN2_NUMBERS, _LLAMA3_NUMBERS = r"\p{N}", r"\p{N}{1,3}"
_GPT2 = {"gpt-2", "gpt2", "olmo"}
_SMOLLM = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
_LLAMA3 = {"llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"}
_QWEN2 = {"qwen2", "deepseek-r1-qwen"}


def read_tokenizer(file: GGUFFile, given: Path | None = None) -> TokenizerFiles:
    """The tokenizer of a GGUF file, or the `given` tokenizer.json with the file's special tokens and chat template.

    With a note instead where its kind cannot be rebuilt.
    """
    settings = ConfigReader(file.metadata, file.path.name)
    if given is not None:
        content = read_given(given)
        if settings.get("tokenizer.ggml.tokens") is None:
            return with_config(content, {}, [given])
        tokens = file.strings("tokenizer.ggml.tokens")
        return with_config(content, _config(settings, tokens), [given], _ends(settings, tokens))
    model = settings.text("tokenizer.ggml.model", "none")
    pre = settings.text("tokenizer.ggml.pre", "default")
    if model == "llama":
        return _sentencepiece(file, settings)
    if model != "gpt2" or pre not in _GPT2 | _SMOLLM | _LLAMA3 | _QWEN2:
        kind = model if model != "gpt2" else f"{model} split as {pre}"
        return TokenizerFiles(notes=(f"the tokenizer ({kind}) cannot be rebuilt; give it with --tokenizer",))
    tokens = file.strings("tokenizer.ggml.tokens")
    types = _types(file, len(tokens))
    tokenizer = _byte_level(tokens, types, file.strings("tokenizer.ggml.merges"), pre, file.path.name)
    config = _config(settings, tokens)
    if around := _around(settings, config, tokens, begins=False):
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), around])
    return with_config(tokenizer.to_str(pretty=False).encode(), config, ends=_ends(settings, tokens))


def _sentencepiece(file: GGUFFile, settings: ConfigReader) -> TokenizerFiles:
    """The BPE of a SentencePiece model (Llama 1 and 2, Mistral): pieces with scores, and bytes for what has none.

    SentencePiece joins the two neighbours whose union has the highest score; as merges these are all ways to cut
    a piece in two pieces, best piece first.
    """
    tokens = file.strings("tokenizer.ggml.tokens")
    types, where = _types(file, len(tokens)), file.path.name
    scores = file.metadata.get("tokenizer.ggml.scores")
    if scores is None or isinstance(scores, int | float | str | Strings) or len(scores) != len(tokens):
        raise UserError(f"{where}: tokenizer.ggml.scores is not one number for each of {len(tokens)} tokens")
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
    if len(vocabulary) != sum(kind != _UNUSED for kind in types):
        raise UserError(f"{where}: tokenizer.ggml.tokens has a token twice")
    joined = {token: i for token, i in vocabulary.items() if types[i] == _NORMAL and len(token) > 1}
    pairs = [
        (token[:cut], token[cut:])
        for token in sorted(joined, key=lambda t: (-scores[joined[t]], joined[t]))
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    tokenizer = Tokenizer(
        BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=_BYTE in types)
    )
    prefix = settings.flag("tokenizer.ggml.add_space_prefix", True)
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    _add_special(tokenizer, tokens, types)
    config = _config(settings, tokens)
    if around := _around(settings, config, tokens, begins=True):
        tokenizer.post_processor = around
    return with_config(tokenizer.to_str(pretty=False).encode(), config, ends=_ends(settings, tokens))


def _around(settings: ConfigReader, config: Mapping[str, Any], tokens: list[str], *, begins: bool) -> Any:
    """The tokens that llama.cpp puts before and after every text; None where there are none.

    `begins` is whether a kind of tokenizer has one before, unless its file says otherwise.
    """
    before = (
        [config["bos_token"]]
        if settings.flag("tokenizer.ggml.add_bos_token", begins) and "bos_token" in config
        else []
    )
    after = (
        [config["eos_token"]]
        if settings.flag("tokenizer.ggml.add_eos_token", False) and "eos_token" in config
        else []
    )
    if not before + after:
        return None
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B:1", *after],
        special_tokens=[(token, tokens.index(token)) for token in {*before, *after}],
    )


def _add_special(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False)])


def _types(file: GGUFFile, count: int) -> list[int]:
    stored = file.metadata.get("tokenizer.ggml.token_type")
    if stored is None:
        return [_NORMAL] * count
    if isinstance(stored, int | float | str | Strings) or len(stored) != count:
        raise UserError(
            f"{file.path.name}: tokenizer.ggml.token_type is not one number for each of {count} tokens"
        )
    return [int(kind) for kind in stored]


def _byte_level(tokens: list[str], types: list[int], merges: list[str], pre: str, where: str) -> Tokenizer:
    # Rows that only fill the embedding up are marked unused; no text may become one.
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
    if len(vocabulary) != sum(kind != _UNUSED for kind in types):
        raise UserError(f"{where}: tokenizer.ggml.tokens has a token twice")
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if len(merges) == 1 and left == right in vocabulary and left + right not in vocabulary:
            continue  # stands for none, as `write_tokenizer` has it
        if not {left, right, left + right} <= vocabulary.keys():
            raise UserError(f"{where}: tokenizer.ggml.merges joins {merge!r}, which are not all tokens")
        pairs.append((left, right))
    tokenizer = Tokenizer(BPE(vocabulary, pairs, ignore_merges=pre in _LLAMA3))
    if pre in _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = _split(_QWEN2_NUMBERS)
    elif pre in _LLAMA3:
        tokenizer.pre_tokenizer = _split(_LLAMA3_NUMBERS)
    else:
        tokenizer.pre_tokenizer = _gpt2() if pre in _GPT2 else _digits_then_gpt2()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    _add_special(tokenizer, tokens, types)
    return tokenizer


def _config(settings: ConfigReader, tokens: list[str]) -> Mapping[str, Any]:
    """`tokenizer_config.json`: the special tokens by name, and the chat template."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (index := _id(settings, theirs, tokens)) is not None:
            config[f"{ours}_token"] = tokens[index]
    if settings.get("tokenizer.chat_template") is not None:
        config["chat_template"] = settings.text("tokenizer.chat_template")
    return config


def _ends(settings: ConfigReader, tokens: list[str]) -> list[int]:
    """What ends an answer: llama.cpp stops at the ends of a turn and of a message too."""
    found = dict.fromkeys(_id(settings, name, tokens) for name in ("eos", "eot", "eom"))
    return [index for index in found if index is not None]


def _id(settings: ConfigReader, name: str, tokens: list[str]) -> int | None:
    """A special token's id, None where the file names none."""
    key = f"tokenizer.ggml.{name}_token_id"
    if settings.get(key) is None:
        return None
    index = settings.integer(key)
    if index >= len(tokens):
        raise settings.wrong(key, index, f"below {len(tokens)}, the number of tokens")
    return index


def write_tokenizer(
    writer: gguf.GGUFWriter, folder: Path, vocabulary: int, refuse: Callable[[str], UserError]
) -> None:
    """Writes the byte-level BPE of a folder's tokenizer.json, and its chat template; `vocabulary` rows in all.

    Raises what `refuse` makes of the reason where there is no tokenizer, one that llama.cpp does not have, or more ends of
    an answer than GGUF has names for.
    """
    from entasis.data.tokenizer import load

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise refuse(f"{folder} has no tokenizer.json, without which llama.cpp opens no file")
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise refuse("only byte-level BPE tokenizers are written to GGUF")
    tokens = [f"[unused{i}]" for i in range(vocabulary)]
    types = [_UNUSED] * vocabulary
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, _NORMAL
    for added in content.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_name_split(load(path).library, refuse))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # llama.cpp wants the list; one merge of two tokens that never stand together is none.
    writer.add_token_merges(merges or [f"{tokens[0]} {tokens[0]}"])
    ends = read_ends(folder)
    if ends.begin is not None:
        writer.add_bos_token_id(ends.begin)
    if ends.end is not None:
        writer.add_eos_token_id(ends.end)
    # The end of a document is found by its name, and an id without a row never comes.
    known = {ends.end, ends.document}
    further = [i for i in dict.fromkeys(ends.others) if 0 <= i < vocabulary and i not in known]
    if len(further) > 2:
        told = ", ".join(map(str, further))
        raise refuse(
            f"GGUF holds two more ends of an answer than eos_token, and generation_config.json has {told}"
        )
    for add, i in zip((writer.add_eot_token_id, writer.add_eom_token_id), further, strict=False):
        add(i)
    # What transformers puts around a text by the same tokenizer.json.
    around = load(path).library.encode("a").ids
    writer.add_add_bos_token(around[:1] == [ends.begin])
    writer.add_add_eos_token(around[-1:] == [ends.end])
    template = read_config(folder).get("chat_template")
    if isinstance(template, str):
        writer.add_chat_template(template)


def _name_split(tokenizer: Tokenizer, refuse: Callable[[str], UserError]) -> str:
    """llama.cpp's name for how text is split before BPE: that of the splitting here which is the tokenizer's."""
    steps = _steps(tokenizer.pre_tokenizer)
    for name, known in (
        ("gpt-2", _gpt2()),
        ("smollm", _digits_then_gpt2()),
        ("qwen2", _split(_QWEN2_NUMBERS)),
        ("llama-bpe", _split(_LLAMA3_NUMBERS)),
    ):
        if steps == _steps(known):
            return name
    told = ", ".join(
        " ".join([step["type"], *(shorten(repr(p)) for p in step.get("pattern", {}).values())])
        for step in steps
    )
    raise refuse(f"llama.cpp has no name for the tokenizer's splitting ({told or 'none'})")


def _steps(splitting: Any) -> list[dict[str, Any]]:
    """What the steps of a splitting are and do to the text; `trim_offsets` changes nothing in it."""
    if splitting is None:
        return []
    parts = json.loads(splitting.__getstate__())
    steps = parts.get("pretokenizers", [parts])
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
