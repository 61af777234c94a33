"""The doctor: is this token data what it claims to be?

    entasis data doctor corpora/stdlib/train
    entasis data doctor old/train.bin --dtype uint16 --vocabulary 50257

Token files without a type are the commonest silent fault of language-model training: read with the wrong one they
still give numbers, losses and rankings. Each examination in `entasis.data.examinations` is one registered function
that looks for one fault and states its evidence; `benchmarks/doctor_matrix.py` counts what they find and what they
wrongly accuse over many texts and tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tokenize import TokenError

import numpy as np

from entasis.data import left_out
from entasis.data import tokenizer as tokenizers
from entasis.data.corpus import INDEX, Corpus
from entasis.data.examinations import EXAMINATIONS, Finding, Sample
from entasis.data.shards import is_unchanged
from entasis.errors import UserError

_SAMPLE = 1 << 19
"""Tokens looked at from the beginning, the middle and the end, unless the examination is thorough."""
NO_NPY = (ValueError, EOFError, OSError, SyntaxError, TokenError)
"""What numpy raises for a damaged .npy file: it parses the header as Python."""


@dataclass(frozen=True)
class Diagnosis:
    """What was looked at and what was found."""

    path: str
    tokens: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    """What is no fault of the data, and should be known."""

    @property
    def sound(self) -> bool:
        return not self.findings


def examine(
    path: str | Path,
    dtype: str | None = None,
    vocabulary: int | None = None,
    tokenizer: str | Path | None = None,
    *,
    thorough: bool = False,
) -> Diagnosis:
    """Examines a corpus folder, a folder of several (`train` and `validation`), or a raw file whose dtype is told.

    A corpus is checked against its own vocabulary and tokenizer, and against those that are given. `thorough` recomputes the content hashes of its
    shards; otherwise a sample is read, in a fraction of a second. Raises `UserError` when there is nothing
    to examine, or a file's dtype is neither told nor written in it, or told of a corpus, whose shards say it.
    """
    path = Path(path)
    chosen = tokenizers.load(tokenizer) if tokenizer else None
    if path.is_dir():
        if dtype is not None:
            raise UserError(f"{path}: a corpus says its own type; leave --dtype out")
        return _examine_corpus(path, vocabulary, chosen, thorough)
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
    return Diagnosis(str(path), len(ids), (*findings, *look_at(ids, vocabulary, tokenizer)))


def look_at(
    ids: np.ndarray, vocabulary: int | None, tokenizer: tokenizers.Tokenizer | None
) -> Iterator[Finding]:
    """What each examination finds, one after the other."""
    taken = _sampled(lambda start, stop: ids[start:stop], len(ids))
    lowest, highest = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
    sample = Sample(taken, lowest, highest, vocabulary, tokenizer)
    for look in EXAMINATIONS:
        yield from look(sample)


def _examine_corpus(
    path: Path, vocabulary: int | None, chosen: tokenizers.Tokenizer | None, thorough: bool
) -> Diagnosis:
    if not (path / INDEX).is_file():
        parts = [p.parent for p in sorted(path.glob(f"*/{INDEX}"))]
        if not parts:
            Corpus(path)  # says what is there instead
        each = [_examine_corpus(part, vocabulary, chosen, thorough) for part in parts]
        found = (
            replace(f, evidence=f"{p.name}: {f.evidence}")
            for p, d in zip(parts, each, strict=True)
            for f in d.findings
        )
        notes = (f"{p.name}: {note}" for p, d in zip(parts, each, strict=True) for note in d.notes)
        return Diagnosis(str(path), sum(d.tokens for d in each), tuple(found), tuple(notes))
    try:
        corpus = Corpus(path)
    except UserError as error:
        fix = "prepare or import the corpus again"
        return Diagnosis(str(path), 0, (Finding("damaged corpus", str(error), fix),))
    findings = []
    if thorough:
        for shard in corpus.shards:
            if not is_unchanged(shard):
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
    if vocabulary is not None:
        highest = max(int(shard.tokens.max(initial=0)) for shard in corpus.shards)
        if highest >= vocabulary:
            evidence = f"the largest id is {highest}, the vocabulary told is {vocabulary}"
            findings.append(
                Finding("ids outside the vocabulary", evidence, "name the corpus's own vocabulary")
            )
    # Every id was below the vocabulary when the shard was written, and the hash says whether it still is that shard.
    ids = _sampled(corpus.read, corpus.tokens)
    diagnosis = examine_ids(path, ids, findings, corpus.vocabulary, chosen or own)
    lost = left_out.lost_by_tokenizer(corpus.text_lost)
    return Diagnosis(str(path), corpus.tokens, diagnosis.findings, () if lost is None else (lost,))


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
        except NO_NPY as error:
            return np.zeros(0, np.uint16), [_truncated(f"{path.name}: {' '.join(str(error).split())}")]
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
