"""The doctor: is this token data what it claims to be?

    entasis data doctor corpora/stdlib/train
    entasis data doctor old/train.bin --dtype uint16 --vocabulary 50257

Token files without a type are the commonest silent fault of language-model training: read with the wrong one they
still give numbers, losses and rankings. Each examination below is one registered function that looks for one fault
and states its evidence; real text of any tokenizer passes all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entasis.data import tokenizer as tokenizers
from entasis.data.corpus import INDEX, Corpus
from entasis.data.shards import content_hash
from entasis.errors import UserError

_SAMPLE = 1 << 19
"""Tokens looked at from the beginning, the middle and the end, unless the examination is thorough."""
_FEWEST = 16
"""Below so many tokens there is no statistical evidence."""


@dataclass(frozen=True)
class Finding:
    """One fault: its name, what shows it, and what to do."""

    name: str
    evidence: str
    cure: str


@dataclass(frozen=True)
class Diagnosis:
    """What was looked at and what was found."""

    path: str
    tokens: int
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        return not self.findings


@dataclass(frozen=True)
class Specimen:
    """What an examination sees: a sample of the ids as read, the range of all, and what is known about them."""

    ids: np.ndarray
    lowest: int
    highest: int
    vocabulary: int | None
    tokenizer: tokenizers.Tokenizer | None


Examination = Callable[[Specimen], Iterator[Finding]]
EXAMINATIONS: list[Examination] = []


def examination(look: Examination) -> Examination:
    """Registers an examination."""
    EXAMINATIONS.append(look)
    return look


def examine(
    path: str | Path,
    dtype: str | None = None,
    vocabulary: int | None = None,
    tokenizer: str | Path | None = None,
    *,
    thorough: bool = False,
) -> Diagnosis:
    """Examines a corpus folder, or a raw token file whose dtype is told.

    A corpus is checked against its own vocabulary and tokenizer. `thorough` recomputes the content hashes of its
    shards; otherwise a sample is read, in a fraction of a second. Raises `UserError` when there is nothing
    to examine, or a file's dtype is neither told nor written in it.
    """
    path = Path(path)
    chosen = tokenizers.load(tokenizer) if tokenizer else None
    if path.is_dir():
        return _examine_corpus(path, chosen, thorough)
    if not path.is_file():
        raise UserError(f"{path}: no such file or corpus")
    return examine_ids(
        path, *_read(path, dtype), vocabulary or (chosen.vocabulary if chosen else None), chosen
    )


def examine_ids(
    path: str | Path,
    ids: np.ndarray,
    findings: list[Finding],
    vocabulary: int | None,
    tokenizer: tokenizers.Tokenizer | None,
) -> Diagnosis:
    """Examines ids that are at hand or mapped from disk, adding to `findings`; memory stays small."""
    sample = _sampled(lambda start, stop: ids[start:stop], len(ids))
    lowest, highest = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
    specimen = Specimen(sample, lowest, highest, vocabulary, tokenizer)
    return Diagnosis(str(path), len(ids), (*findings, *(f for look in EXAMINATIONS for f in look(specimen))))


def _examine_corpus(path: Path, chosen: tokenizers.Tokenizer | None, thorough: bool) -> Diagnosis:
    if not (path / INDEX).is_file():
        Corpus(path)  # says what is there instead
    try:
        corpus = Corpus(path)
    except UserError as error:
        cure = "prepare or import the corpus again"
        return Diagnosis(str(path), 0, (Finding("damaged corpus", str(error), cure),))
    findings = []
    if thorough:
        for shard in corpus.shards:
            if (
                content_hash(np.asarray(shard.tokens), shard.documents, shard.document_bytes)
                != shard.content_hash
            ):
                evidence = f"{shard.path.name} does not have the content hash written in it"
                findings.append(Finding("corrupted content", evidence, "restore the shard or prepare again"))
    own = None
    try:
        own = tokenizers.load(corpus.tokenizer_path)
        if own.hash != corpus.tokenizer_hash:
            evidence = f"tokenizer.json has hash {own.hash[:12]}, the shards were made with {corpus.tokenizer_hash[:12]}"
            findings.append(
                Finding("wrong tokenizer", evidence, "put the tokenizer back that made the shards")
            )
    except UserError as error:
        findings.append(Finding("no tokenizer", str(error), "put the corpus's tokenizer.json back"))
    if chosen is not None and chosen.hash != corpus.tokenizer_hash:
        evidence = f"the one given has hash {chosen.hash[:12]}, the shards {corpus.tokenizer_hash[:12]}"
        findings.append(Finding("wrong tokenizer", evidence, "use the corpus's own tokenizer.json"))
    # Every id was below the vocabulary when the shard was written, and the hash says whether it still is that shard.
    ids = _sampled(corpus.read, corpus.tokens)
    diagnosis = examine_ids(path, ids, findings, corpus.vocabulary, chosen or own)
    return Diagnosis(str(path), corpus.tokens, diagnosis.findings)


def _sampled(read: Callable[[int, int], np.ndarray], n: int) -> np.ndarray:
    if n <= 3 * _SAMPLE:
        return read(0, n)
    # Even starts, so that every other token stays every other token.
    starts = (0, n // 2 // 4 * 4, (n - _SAMPLE) // 4 * 4)
    return np.concatenate([read(s, s + _SAMPLE) for s in starts])


def parse_dtype(name: str) -> np.dtype:
    """`uint16`, `int32`, …; `uint16be` is big-endian. Raises `UserError`."""
    known = ("uint8", "uint16", "uint32", "int16", "int32", "int64", "uint64")
    plain = name.removesuffix("be")
    if plain not in known:
        raise UserError(
            f"--dtype {name!r} is not known; choose one of {', '.join(known)} (add be for big-endian)"
        )
    return np.dtype(plain).newbyteorder(">" if name.endswith("be") else "<")


def _read(path: Path, dtype: str | None) -> tuple[np.ndarray, list[Finding]]:
    """A raw file's ids, and the faults of the file itself."""
    if dtype is None:
        with path.open("rb") as file:
            if file.read(6) != b"\x93NUMPY":
                raise UserError(f"{path}: a file without a type; tell its --dtype (it is never guessed)")
        try:
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            return np.zeros(0, np.uint16), [_truncated(f"{path.name}: {error}")]
        if ids.dtype.kind not in "ui":
            raise UserError(f"{path}: holds {ids.dtype}, which are no token ids")
        return ids.reshape(-1), []
    kind = parse_dtype(dtype)
    size = path.stat().st_size
    findings = []
    if size % kind.itemsize:
        findings.append(_truncated(f"{size} bytes are no whole number of {kind.itemsize}-byte ids"))
    if size < kind.itemsize:
        return np.zeros(0, kind), findings
    return np.memmap(path, kind, mode="r", shape=(size // kind.itemsize,)), findings


def _truncated(evidence: str) -> Finding:
    return Finding("truncated file", evidence, "copy or download the file again")


@examination
def swallowed_header(specimen: Specimen) -> Iterator[Finding]:
    """A file format's header read as if it were tokens."""
    start = np.ascontiguousarray(specimen.ids[:4096]).astype(specimen.ids.dtype).tobytes()
    magic = int.from_bytes(start[:4], "little")
    known = {20240520: "llm.c", 20240801: "llm.c"}
    if start[:6] == b"\x93NUMPY":
        evidence = "the first bytes are \\x93NUMPY: the header of a .npy file was read as tokens"
        yield Finding(
            "swallowed .npy header", evidence, "import it with --format npy, which reads the header"
        )
    elif magic in known and len(start) >= 1024:
        evidence = f"the first number is {magic}, the mark of {known[magic]}'s 1024-byte header"
        yield Finding("swallowed header", evidence, "import it with --format llm.c, which reads the header")
    elif start[8:10] == b'{"' and 0 < int.from_bytes(start[:8], "little") < 1 << 27:
        evidence = "it begins like a safetensors file"
        yield Finding("swallowed header", evidence, "give the folder of the corpus, or extract the tensor")


@examination
def wider_read_as_narrower(specimen: Specimen) -> Iterator[Finding]:
    """32- or 64-bit ids read as 16- or 32-bit ones: every other number is (nearly) always zero."""
    ids = specimen.ids
    width = ids.dtype.itemsize
    if len(ids) < _FEWEST or width > 4:
        return
    for stride in (4, 2):
        n = len(ids) // stride * stride
        lanes = [ids[k:n:stride] for k in range(stride)]
        if n < _FEWEST or width * stride > 8:
            continue
        # The high half of an id below 2^20 is below 16; the low half of real ids spreads far beyond.
        small = [bool((lane.astype(np.int64) < 16).mean() > 0.98) for lane in lanes]
        spread = [bool((lane.astype(np.int64) >= 16).mean() > 0.3) for lane in lanes]
        zeros = [float((lane == 0).mean()) for lane in lanes]
        if sum(spread) == 1 and sum(small) == stride - 1:
            low = spread.index(True)
            quiet = [f"{z:.1%}" for k, z in enumerate(zeros) if k != low]
            told = f"{ids.dtype.kind.replace('u', 'uint').replace('i', 'int')}{8 * width}"
            bits = 8 * width * stride
            evidence = (
                f"of every {stride} numbers {stride - 1} {'is' if stride == 2 else 'are'} almost always zero "
                f"({', '.join(quiet)} zeros there, {zeros[low]:.1%} in the rest): {bits}-bit ids read as {told}"
            )
            order = "be" if low == stride - 1 else ""
            cure = f"import the file with --dtype {'int' if bits == 64 else 'uint'}{bits}{order}"
            yield Finding("wider ids read as narrower", evidence, cure)
            return


@examination
def narrower_read_as_wider(specimen: Specimen) -> Iterator[Finding]:
    """Two 16-bit ids read as one 32-bit id."""
    ids = specimen.ids
    if ids.dtype.itemsize != 4 or len(ids) < _FEWEST:
        return
    values = ids.astype(np.uint32)
    high, low = values >> 16, values & 0xFFFF
    if (high >= 16).mean() > 0.5 and (low >= 16).mean() > 0.5:
        evidence = f"{(high > 0).mean():.1%} of the ids are above 65535, the largest is {int(values.max())}"
        yield Finding("narrower ids read as wider", evidence, "import the file with --dtype uint16")


@examination
def swapped_bytes(specimen: Specimen) -> Iterator[Finding]:
    """Big-endian ids read as little-endian."""
    ids, vocabulary = specimen.ids, specimen.vocabulary
    if len(ids) < _FEWEST or ids.dtype.itemsize not in (2, 4):
        return
    native = ids.astype(ids.dtype.newbyteorder("="))
    swapped = native.byteswap()
    if ids.dtype.itemsize == 4:
        wrong = bool(
            (native.astype(np.int64) >= 1 << 24).mean() > 0.5 and swapped.astype(np.int64).max() < 1 << 24
        )
        evidence = (
            f"{(native.astype(np.int64) >= 1 << 24).mean():.1%} of the ids are above 2^24, swapped none is"
        )
    elif vocabulary is not None and vocabulary < 1 << 16 and specimen.highest >= vocabulary:
        wrong = int(swapped.max()) < vocabulary
        beyond = (native.astype(np.int64) >= vocabulary).mean()
        evidence = f"{beyond:.1%} of the ids are outside the vocabulary of {vocabulary}, swapped none is"
    else:
        # Frequent ids are low ones, so the high byte is the more predictable of the two.
        high, low = _entropy((native >> 8) & 0xFF), _entropy(native & 0xFF)
        wrong = len(ids) >= 1024 and high > low + 0.5
        evidence = (
            f"the high byte carries {high:.1f} bits and the low byte {low:.1f}; in real ids it is the reverse"
        )
    if wrong:
        width = 8 * ids.dtype.itemsize
        big = ids.dtype.byteorder == ">"
        yield Finding(
            "swapped bytes", evidence, f"import the file with --dtype uint{width}{'' if big else 'be'}"
        )


@examination
def outside_the_vocabulary(specimen: Specimen) -> Iterator[Finding]:
    """Ids that the tokenizer does not have, and vocabularies that the ids cannot hold."""
    ids, vocabulary = specimen.ids, specimen.vocabulary
    if not len(ids) or vocabulary is None:
        return
    low, high = specimen.lowest, specimen.highest
    narrow = ids.dtype.itemsize == 2
    if low < 0:
        share = (ids < 0).mean()
        evidence = f"{share:.2%} of the ids are negative: ids from 32768 upwards wrapped in {ids.dtype}"
        yield Finding("wrapped ids", evidence, "tell an unsigned --dtype, or tokenise again into a wider one")
    elif narrow and vocabulary > 1 << 16:
        evidence = (
            f"a vocabulary of {vocabulary} does not fit into 16 bits: ids from 65536 upwards have wrapped"
        )
        yield Finding(
            "wrapped ids", evidence, "tokenise the text again into 32-bit ids; the lost bits are lost"
        )
    elif high < 1 << 16 and vocabulary >= 70_000 and len(ids) >= 50_000:
        evidence = f"of {len(ids)} ids none is above 65535, though the vocabulary has {vocabulary}"
        yield Finding(
            "wrapped ids", evidence, "tokenise the text again; somewhere the ids went through 16 bits"
        )
    elif high >= vocabulary:
        share = (ids.astype(np.int64) >= vocabulary).mean()
        evidence = f"{share:.2%} of the ids are outside the vocabulary of {vocabulary}; the largest is {high}"
        yield Finding(
            "ids outside the vocabulary", evidence, "name the tokenizer and dtype that made the file"
        )


@examination
def wrong_tokenizer(specimen: Specimen) -> Iterator[Finding]:
    """Ids that, decoded and encoded again, become other ids: another tokenizer made them."""
    chosen, ids = specimen.tokenizer, specimen.ids
    if chosen is None or len(ids) < 256 or int(ids.max()) >= chosen.vocabulary or int(ids.min()) < 0:
        return
    kept, total = 0, 0
    for segment in _segments(ids, chosen.end_of_text):
        again = chosen.encode(chosen.decode(segment))
        a, b = _boundaries(chosen, segment), _boundaries(chosen, again)
        kept += len(a & b)
        total += len(a | b)
    if total and kept / total < 0.9:
        evidence = (
            f"decoded and encoded again, only {kept / total:.1%} of the token boundaries stay where they were"
        )
        yield Finding("wrong tokenizer", evidence, "name the tokenizer that made the file")


def _segments(ids: np.ndarray, end: int | None) -> list[list[int]]:
    """Stretches of up to 400 ids within a document, from a few places."""
    result = []
    for start in np.linspace(0, max(0, len(ids) - 400), 8).astype(int):
        stretch = ids[start : start + 400].astype(np.int64).tolist()
        if end in stretch:
            parts = [i for i, x in enumerate(stretch) if x == end]
            edges = [-1, *parts, len(stretch)]
            stretch = max((stretch[a + 1 : b] for a, b in itertools.pairwise(edges)), key=len)
        if len(stretch) > 8:
            result.append(stretch)
    return result


def _boundaries(chosen: tokenizers.Tokenizer, ids: list[int]) -> set[int]:
    # In a byte-level vocabulary each character of a token's name is one byte of text.
    lengths = [len(chosen.library.id_to_token(i) or "") for i in ids]
    return set(np.cumsum(lengths).tolist())


def _entropy(values: np.ndarray) -> float:
    counts = np.bincount(values.astype(np.int64).ravel(), minlength=256)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())
