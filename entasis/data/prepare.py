"""From text to a corpus: surveyed, split, tokenised, written shard by shard.

    entasis data prepare stdlib --train-tokenizer 4096 --output corpora/stdlib

The text is read twice. The first time it is measured: sizes, exact and near duplicates, and from them which
documents are held out. The second time it is tokenised and written. Neither reading holds more than a batch of
text and one shard of tokens. What a killed run finished is not done again. What is left out is counted by reason, and
ids are decoded again to see how much of the text they hold.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from entasis.data import dedup, round_trip, split
from entasis.data import tokenizer as tokenizers
from entasis.data.corpus import INDEX, TOKENIZER, Corpus
from entasis.data.prepared_folder import PREPARED, SURVEY, WORK, claim
from entasis.data.readers import Document, EncodingErrors, Losses
from entasis.data.shards import hash_of_document, write_shard
from entasis.data.sources import COLUMN, TextSources
from entasis.errors import UserError
from entasis.files import aside, read_json, write_json

SHARD_TOKENS = 1 << 25
_BATCH_BYTES = 1 << 20
_TOKENIZER_SAMPLE = 64 << 20
_COMPARED_FIRST, _COMPARED_OF = 1000, 16
"""So many documents are compared with what their ids decode to, and then one of so many."""
LEFT_OUT = "left-out.json"
OVER_LIMIT = "over --limit"
_SKIPPED, _TRAIN, _VALIDATION = 0, 1, 2
SIDES = {"train": _TRAIN, "validation": _VALIDATION}

Progress = Callable[[str, int, int], Any]
"""Called with the phase (survey, tokenizer, tokens), the bytes done and the bytes in all (0: not known yet)."""


def prepare(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    train_tokenizer: int | None = None,
    validation: float = 0.05,
    seed: int = 0,
    limit: int | None = None,
    column: str = COLUMN,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    encoding_errors: EncodingErrors = "drop-file",
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes `output/train` and `output/validation`; returns what they hold, and under `left_out` what they do not.

    `validation` is the held-out share of bytes, `limit` a cap on source bytes (whole documents, drawn by name); for the
    others see `TextSources`. Exactly one of `tokenizer` (see `tokenizer.load`) and `train_tokenizer` (its number of
    ids) is given. A folder that holds the same is answered from, unless a source has changed: then another beside it
    is prepared, and `note` says so. One that holds something else is refused (`UserError`).
    """
    report = progress or (lambda *_: None)
    if (tokenizer is None) == (train_tokenizer is None):
        raise UserError("give either a tokenizer or --train-tokenizer VOCABULARY")
    if not 0 <= validation < 1:
        raise UserError(f"--validation is {validation}; it must be a share from 0 to below 1")
    text = TextSources(
        tuple(str(s) for s in sources), column, tuple(include), tuple(exclude), encoding_errors
    )
    arguments = {
        "sources": list(text.sources),
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "train_tokenizer": train_tokenizer,
        "validation": validation,
        "seed": seed,
        "limit": limit,
        "column": column,
        "include": list(include),
        "exclude": list(exclude),
        "encoding_errors": encoding_errors,
        "shard_tokens": shard_tokens,
    }
    state: dict[str, Any] = dict(text.state())
    if tokenizer is not None:
        state[f"tokenizer {tokenizer}"] = tokenizers.load(tokenizer).hash
    output, note = claim(Path(output), arguments, state, tuple(SIDES))
    if not (output / PREPARED).is_file():
        _fill(output, text, arguments, tokenizer, report)
    result = read_json(output / PREPARED)
    return result if note is None else {**result, "note": note}


def _fill(
    output: Path, text: TextSources, arguments: dict[str, Any], tokenizer: str | Path | None, report: Progress
) -> None:
    started = time.perf_counter()
    work = output / WORK
    work.mkdir(exist_ok=True)
    sides, sizes = _survey(text, arguments["validation"], arguments["seed"], arguments["limit"], work, report)
    chosen = _tokenizer(tokenizer, arguments["train_tokenizer"], text, sides, work, report)
    survey = read_json(work / LEFT_OUT)
    told = {key: survey[key] for key in ("left_out", "near_duplicates")}
    _write_tokens(text, sides, sizes, chosen, output, arguments["shard_tokens"], told, report)
    result = {
        "output": str(output),
        "arguments": arguments,
        "tokenizer": chosen.hash,
        "vocabulary": chosen.vocabulary,
        "source_documents": len(sides),
        **told,
        "seconds": time.perf_counter() - started,
        **{name: totals(output / name) for name in SIDES if (output / name / INDEX).is_file()},
    }
    write_json(output / PREPARED, result)
    shutil.rmtree(work, ignore_errors=True)


def _survey(
    text: TextSources,
    validation: float,
    seed: int,
    limit: int | None,
    work: Path,
    report: Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """The side of every document (skipped, train, validation) and its bytes."""
    saved = work.parent / SURVEY
    if saved.is_file():
        sides, sizes = np.load(saved, allow_pickle=False)
        return sides, sizes
    names: list[str] = []
    bytes_of: list[int] = []
    signatures: list[tuple[np.ndarray, np.ndarray]] = []
    seen, size = 0, text.size()
    losses = Losses()
    for document in text.documents(losses):
        names.append(document.name)
        bytes_of.append(len(document.text.encode("utf-8")))
        if validation:
            signatures.append(dedup.signature(document.text))
        seen += bytes_of[-1]
        report("survey", seen, size)
    if not names:
        raise UserError(f"no text in {', '.join(text.sources)}{_told(losses)}")
    sizes = np.array(bytes_of, np.int64)
    sides = np.full(len(names), _TRAIN, np.int64)
    if limit is not None:
        # It ends at the first that does not fit: results that are published were drawn so.
        drawn = np.array(sorted(range(len(names)), key=lambda i: split.hash_of(names[i], seed + 1)))
        sides[drawn[np.cumsum(sizes[drawn]) > limit]] = _SKIPPED
        for i in np.flatnonzero(sides == _SKIPPED):
            losses.add(OVER_LIMIT, names[i], int(sizes[i]))
    kept = np.flatnonzero(sides)
    if not len(kept):
        raise UserError(f"--limit {limit}: the first document drawn is larger; allow more")
    alike = Losses()
    if validation:
        minhashes, shingles = zip(*(signatures[i] for i in kept), strict=True)
        group, boilerplate = dedup.groups(np.stack(minhashes), shingles)
        out = split.draw_held_out([names[i] for i in kept], sizes[kept], group, boilerplate, validation, seed)
        if out.all() or not out.any():
            raise UserError(
                "all documents are near-duplicates of one another or there is but one, so nothing can be held out; "
                "add text, or give --validation 0"
            )
        sides[kept[out]] = _VALIDATION
        for i in kept[np.bincount(group, minlength=len(kept))[group] > 1]:
            alike.add("near-duplicates", names[i], int(sizes[i]))
    write_json(
        work / LEFT_OUT,
        {"left_out": losses.reasons, "near_duplicates": alike.reasons.get("near-duplicates")},
    )
    with aside(saved) as partial, partial.open("wb") as file:
        np.save(file, np.stack([sides, sizes]), allow_pickle=False)
    return sides, sizes


def _told(losses: Losses) -> str:
    told = [f"{reason}: {entry['first'][0]}" for reason, entry in losses.reasons.items()]
    return f" ({'; '.join(told)})" if told else ""


def _tokenizer(
    given: str | Path | None,
    train: int | None,
    text: TextSources,
    sides: np.ndarray,
    work: Path,
    report: Progress,
) -> tokenizers.Tokenizer:
    if given is not None:
        return tokenizers.load(given)
    saved = work / TOKENIZER
    if not saved.is_file():
        assert train is not None
        trained = tokenizers.train(_sample(text, sides, report), train)
        trained.save(saved)
    return tokenizers.load(saved)


def _sample(text: TextSources, sides: np.ndarray, report: Progress) -> Iterator[str]:
    """Training text, from the beginning of the corpus to its end where that is short enough."""
    taken = 0
    for side, document in zip(sides, text.documents(), strict=True):
        if side == _TRAIN and taken < _TOKENIZER_SAMPLE:
            taken += len(document.text)
            report("tokenizer", taken, 0)
            yield document.text


class _Encoded(NamedTuple):
    """A document's ids, and what is kept of its text."""

    number: int
    side: int
    size: int
    text_hash: int
    ids: np.ndarray
    lost: int | None
    """Bytes that the ids do not give back; None where that was not looked at."""


@dataclass
class _Side:
    """One half of the corpus on its way to disk."""

    folder: Path
    chosen: tokenizers.Tokenizer
    shards: dict[str, str] = field(default_factory=dict)
    finished: int = 0
    """Source documents up to here are in finished shards."""
    ids: list[np.ndarray] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    waiting: int = 0
    compared: int = 0
    """Bytes of the documents that were compared with what their ids decode to."""
    lost: int = 0

    def resume(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = self.folder / "progress.json"
        if state.is_file():
            earlier = read_json(state)
            self.shards, self.finished = earlier["shards"], earlier["finished"]
            self.compared, self.lost = earlier.get("compared", 0), earlier.get("lost", 0)
        for path in self.folder.glob("shard-*"):
            if path.name not in self.shards:
                path.unlink()  # written after the last entry in progress.json, or half-written

    def add(self, document: _Encoded) -> None:
        ids = document.ids
        if self.chosen.end_of_text is not None:
            ids = np.append(ids, np.uint32(self.chosen.end_of_text))
        self.ids.append(ids)
        self.sizes.append(document.size)
        self.hashes.append(document.text_hash)
        self.waiting += len(ids)
        if document.lost is not None:
            self.compared += document.size
            self.lost += min(document.lost, document.size)

    def flush(self, finished: int) -> None:
        """Writes what waits as a shard, and then that it is there."""
        if self.ids:
            name = f"shard-{len(self.shards):05d}.safetensors"
            ends = np.cumsum([0, *(len(x) for x in self.ids)], dtype=np.int64)
            self.shards[name] = write_shard(
                self.folder / name,
                np.concatenate(self.ids),
                ends,
                np.array(self.sizes, np.int64),
                vocabulary=self.chosen.vocabulary,
                tokenizer_hash=self.chosen.hash,
                document_hashes=np.array(self.hashes, np.uint64),
            )
        self.ids, self.sizes, self.hashes, self.waiting, self.finished = [], [], [], 0, finished
        state = {"shards": self.shards, "finished": finished, "compared": self.compared, "lost": self.lost}
        write_json(self.folder / "progress.json", state)

    def close(self, told: dict[str, Any]) -> None:
        """Writes the index, which says too what the sources held and the corpus does not (`told`)."""
        self.chosen.save(self.folder / TOKENIZER)
        index = {
            "shards": self.shards,
            "vocabulary": self.chosen.vocabulary,
            "tokenizer": self.chosen.hash,
            "end_of_text": self.chosen.end_of_text,
            "text_lost": self.lost / self.compared if self.compared else None,
            **told,
        }
        write_json(self.folder / INDEX, index)
        (self.folder / "progress.json").unlink()


def _write_tokens(
    text: TextSources,
    sides: np.ndarray,
    sizes: np.ndarray,
    chosen: tokenizers.Tokenizer,
    output: Path,
    shard_tokens: int,
    told: dict[str, Any],
    report: Progress,
) -> None:
    halves = {
        side: _Side(output / name, chosen)
        for name, side in SIDES.items()
        if (sides == side).any() and not (output / name / INDEX).is_file()
    }
    for half in halves.values():
        half.resume()
    done, total = 0, int(sizes[sides != _SKIPPED].sum())
    changed = UserError("the sources have changed since they were surveyed; give the command again")

    def encode(batch: list[tuple[int, int, Document]]) -> list[_Encoded]:
        encoded = []
        for (i, side, document), ids in zip(
            batch, chosen.encode_batch([d.text for _, _, d in batch]), strict=True
        ):
            content = document.text.encode("utf-8")
            look = i < _COMPARED_FIRST or i % _COMPARED_OF == 0
            lost = round_trip.lost_bytes(chosen, document.text, ids) if look else None
            encoded.append(_Encoded(i, side, len(content), hash_of_document(content), ids, lost))
        return encoded

    def wanted() -> Iterator[tuple[int, int, Document]]:
        for i, document in enumerate(text.documents()):
            if i >= len(sides):
                raise changed
            side = int(sides[i])
            if side in halves and i >= halves[side].finished:
                yield i, side, document

    # Batches are encoded on all cores, without the interpreter's lock; two at a time, so that the cores stay busy
    # while the ids of one become an array and the one before is stored.
    with ThreadPoolExecutor(2) as pool:
        for encoded in _ahead(pool, 2, encode, _batches(wanted())):
            for document in encoded:
                if document.size != sizes[document.number]:
                    raise changed
                half = halves[document.side]
                half.add(document)
                done += document.size
                if half.waiting >= shard_tokens:
                    half.flush(document.number + 1)
            report("tokens", done, total)
    for half in halves.values():
        half.flush(len(sides))
        half.close(told)


def _batches(items: Iterator[tuple[int, int, Document]]) -> Iterator[list[tuple[int, int, Document]]]:
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += len(item[2].text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _ahead(
    pool: ThreadPoolExecutor, n: int, work: Callable[[Any], Any], items: Iterator[Any]
) -> Iterator[Any]:
    """What `work` makes of each item, in order, with `n` items in hand besides the one that is awaited."""
    pending: deque[Future[Any]] = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) > n:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def totals(folder: Path) -> dict[str, Any]:
    """What a corpus holds, for JSON."""
    corpus = Corpus(folder)
    return {
        "documents": corpus.documents,
        "tokens": corpus.tokens,
        "bytes": corpus.bytes,
        "shards": len(corpus.shards),
        "fingerprint": corpus.fingerprint,
        "text_lost": corpus.text_lost,
    }
