"""Whom the doctor accuses wrongly, and what it misses: every text of `doctor_samples.py` in every tokenizer.

    python benchmarks/doctor_matrix.py --table docs/data.md

Each corpus is examined as a raw file (with and without the vocabulary and tokenizer told, whole and its first 1,500
ids), and with every fault planted in it. The thresholds in `entasis/data/examinations.py` were set looking at the
first, third, fifth … tokenizer and text only; the table counts the others apart. Downloads about 75 MB the first
time; needs npm, and Debian's apt-get and dpkg-deb.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import write
from doctor_samples import all_tokenizers, texts, up_to

from entasis.data import doctor
from entasis.data.tokenizer import Tokenizer

ANOTHER, CIPHER, FOLDED = (
    "another tokenizer told",
    "another tokenizer told: a cipher",
    "few ids above 65535, folded",
)
NARROW = "big-endian uint16 of fewer than 256 different ids"
FEW = 256
"""Different ids: a text of fewer, or of single characters, read as others is a cipher, and nothing in its form tells."""
BEGIN, END = "<!-- doctor matrix -->", "<!-- end of doctor matrix -->"
CHARACTERS = 60_000
"""Of each text: some 15,000 to 180,000 ids."""
Case = tuple[str, bytes, str, int | None, Tokenizer | None]
"""What it is called, a file's content, the dtype told, the vocabulary told, the tokenizer told."""


def stream(chosen: Tokenizer, documents: list[str]) -> np.ndarray:
    """All ids, documents closed where the tokenizer has an end."""
    end = [] if chosen.end_of_text is None else [chosen.end_of_text]
    return np.concatenate([np.append(ids, end).astype(np.int64) for ids in chosen.encode_batch(documents)])


def sound(ids: np.ndarray, chosen: Tokenizer) -> Iterator[Case]:
    """The corpus as it may be stored and told."""
    narrow = "uint16" if chosen.vocabulary <= 1 << 16 else "uint32"
    for length in (None, 1500):
        for dtype in (narrow, "int32"):
            data = ids[:length].astype(dtype).tobytes()
            yield f"{dtype}, nothing told", data, dtype, None, None
            yield f"{dtype}, tokenizer told", data, dtype, chosen.vocabulary, chosen


def faults(ids: np.ndarray, chosen: Tokenizer) -> Iterator[Case]:
    """Everything that can be wrong with it, each told as little as possible and as much as possible."""
    draw = np.random.default_rng(0)
    plain: list[tuple[str, np.ndarray, str]] = []
    # Ids below 16 read wrongly are, to the bit, another sound corpus: 1 0 2 0 may as well be "A,C,".
    if (ids >= 16).mean() > 0.5:
        plain += [(f"{kind} read as uint16", ids.astype(kind), "uint16") for kind in ("int32", "int64")]
        plain += [("int64 read as uint32", ids.astype("int64"), "uint32")]
        plain += [("big-endian int32 read as uint16", ids.astype(">i4"), "uint16")]
        plain += [("big-endian int32 read as int32", ids.astype(">i4"), "int32")]
    if chosen.vocabulary <= 1 << 16 and (ids >= 256).mean() > 0.5:
        kind = NARROW if len(np.unique(ids)) < FEW else "big-endian uint16 read as uint16"
        plain += [(kind, ids.astype(">u2"), "uint16")]
    if chosen.vocabulary <= 1 << 16:
        plain += [("uint16 read as uint32", ids[: len(ids) // 2 * 2].astype("<u2"), "uint32")]
    if chosen.vocabulary <= 256:
        plain += [("uint8 read as uint16", ids[: len(ids) // 2 * 2].astype("u1"), "uint16")]
    tail = ids.copy()
    tail[len(ids) // 2 :] = 0
    holes = np.where(draw.random(len(ids)) < 0.5, 0, ids)
    wide = "uint16" if chosen.vocabulary <= 1 << 16 else "uint32"
    plain += [
        ("all zeros", np.zeros_like(ids).astype(wide), wide),
        ("one id only", np.full_like(ids, ids[0]).astype(wide), wide),
        ("second half zeros", tail.astype(wide), wide),
        ("every other one zero at random", holes.astype(wide), wide),
        ("ids stored as float32, read as uint32", ids.astype("f4"), "uint32"),
        ("ids stored as float32, read as uint16", ids.astype("f4"), "uint16"),
        ("float16 noise", draw.standard_normal(len(ids)).astype("f2"), "uint16"),
        ("float32 noise read as uint32", draw.standard_normal(len(ids)).astype("f4"), "uint32"),
        ("float32 noise read as uint16", draw.standard_normal(len(ids)).astype("f4"), "uint16"),
        ("random bytes as uint16", draw.integers(0, 1 << 16, len(ids)).astype("<u2"), "uint16"),
        ("random bytes as int32", draw.integers(0, 1 << 32, len(ids)).astype("<u4"), "int32"),
        ("random bytes as uint8", draw.integers(0, 1 << 8, len(ids)).astype("u1"), "uint8"),
    ]
    if ids.max() < 65_504:
        plain += [("ids stored as float16", ids.astype("f2"), "uint16")]
    for name, stored, dtype in plain:
        yield name, stored.tobytes(), dtype, None, None
        yield name, stored.tobytes(), dtype, chosen.vocabulary, chosen
    data = ids.astype(wide).tobytes()
    yield "empty file", b"", wide, None, None
    yield "cut within an id", data[:-1], wide, None, None
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<u2', 'fortran_order': False, 'shape': (9,), }".ljust(128)
    yield "swallowed .npy header", header + data, wide, None, None
    magic = np.zeros(256, "<i4")
    magic[:3] = 20240520, 1, len(ids)
    yield "swallowed llm.c header", magic.tobytes() + data, wide, None, None
    yield "ids outside the vocabulary", data, wide, int(ids.max()), None
    if (ids & 1 << 15).any():
        yield "wrapped in int16", ids.astype("<i2").tobytes(), "int16", None, None
    if (ids >= 1 << 16).any():
        yield "wrapped in uint16", ids.astype("<u2").tobytes(), "uint16", chosen.vocabulary, None
        through = (ids & 0xFFFF).astype("<u4").tobytes()
        few = len(np.unique(ids[ids >= 1 << 16])) < FEW
        yield FOLDED if few else "went through 16 bits", through, "uint32", chosen.vocabulary, chosen


def foreign(
    name: str, ids: np.ndarray, every: dict[str, Tokenizer], streams: dict[str, np.ndarray]
) -> Iterator[Case]:
    """The ids with each other tokenizer told that has them all, where it would make other ids of the text."""
    for other_name, other in every.items():
        if other_name == name or ids.max() >= other.vocabulary:
            continue
        theirs = streams[other_name]
        if np.array_equal(theirs, ids):
            continue
        cipher = len(np.unique(ids)) < FEW or _single(ids, other)
        kind = CIPHER if cipher else ANOTHER
        yield kind, ids.astype("<u4").tobytes(), "uint32", other.vocabulary, other


def _single(ids: np.ndarray, chosen: Tokenizer) -> bool:
    """Whether three in four of the ids stand for one character, one byte or one number."""
    values, counts = np.unique(ids, return_counts=True)
    names = ((chosen.library.id_to_token(int(i)) or "").strip("▁Ġ#") for i in values)
    one = [len(n) <= 1 or n.isdigit() or (n.startswith("<0x") and len(n) == 6) for n in names]
    return bool(counts[one].sum() > 0.75 * counts.sum())


def examined(file: Path, case: Case) -> str | None:
    """The first finding; the others would only take time."""
    _, data, dtype, vocabulary, chosen = case
    file.write_bytes(data)
    ids, found = doctor._read(file, dtype)
    return next(
        (f.name for f in (*found, *itertools.islice(doctor.look_at(ids, vocabulary, chosen), 1))), None
    )


def main() -> None:
    """Prints and writes benchmarks/results/doctor_matrix-TIME.json, and the table where it is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", metavar="FILE", help="where the table stands between its two marks")
    parser.add_argument("--halves", default="both", help="set: only what thresholds may be set on")
    args = parser.parse_args()
    text = texts()
    every = all_tokenizers(text)
    text = {name: list(up_to(parts, CHARACTERS)) for name, parts in text.items()}
    seen = [set(list(every)[::2]), set(list(text)[::2])]
    streams = {s: {n: stream(t, parts) for n, t in every.items()} for s, parts in text.items()}
    counts: Counter[tuple[str, str, str]] = Counter()
    wrong: list[str] = []
    unknown: list[str] = []
    begun, shown = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.bin"
        for name, chosen in every.items():
            for script in text:
                half = "set on" if name in seen[0] and script in seen[1] else "held out"
                if half == "held out" and (name in seen[0] or script in seen[1]):
                    half = "half held out"
                if args.halves == "set" and half != "set on":
                    continue
                ids = streams[script][name]
                missing = (ids == chosen.unknown).mean() if chosen.unknown is not None else 0
                if missing > 0.5:
                    unknown.append(f"{script} in {name}")
                    ill: Iterator[Case] = iter(
                        [("mostly unknown ids", ids.astype("<u4").tobytes(), "uint32", None, chosen)]
                    )
                else:
                    counts[half, "sound", "corpora"] += 1
                    for case in sound(ids, chosen):
                        counts[half, "sound", "examinations"] += 1
                        if found := examined(file, case):
                            counts[half, "sound", "accused"] += 1
                            wrong.append(
                                f"accused: {script} in {name} ({len(case[1])} bytes, {case[0]}): {found}"
                            )
                    ill = (*faults(ids, chosen), *foreign(name, ids, every, streams[script]))
                for case in ill:
                    kind = case[0]
                    counts[half, kind, "planted"] += 1
                    if not examined(file, case):
                        counts[half, kind, "missed"] += 1
                        if kind not in (CIPHER, FOLDED, NARROW):
                            told = [n for n, t in every.items() if t is case[4]]
                            wrong.append(f"missed: {script} in {name}: {kind}; told {told or 'nothing'}")
            print(f"{name}: {time.perf_counter() - begun:.0f} s, {len(wrong)} wrong", flush=True)
            print(*wrong[shown:], sep="\n", flush=True)
            shown = len(wrong)
    print(*unknown, sep="\n")
    table = render(counts, list(every), list(text), seen)
    print(table)
    if args.table:
        write(
            "doctor_matrix",
            ["tokenizers", "numpy"],
            tokenizers=list(every),
            texts=list(text),
            wrong=wrong,
            unknown=unknown,
            counts=[[*key, n] for key, n in sorted(counts.items())],
        )
        page = Path(args.table).read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        Path(args.table).write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


HALVES = ("set on", "half held out", "held out")


def render(counts: Counter, names: list[str], scripts: list[str], seen: list[set[str]]) -> str:
    """The table: sound corpora accused, and of each fault how many were missed."""
    lines = ["| | thresholds set on | tokenizer or text new | both new |", "|---|---|---|---|"]

    def row(title: str, kind: str, of: str, what: str) -> None:
        cells = (
            f"{counts[h, kind, what]} of {counts[h, kind, of]:,}" if counts[h, kind, of] else "–"
            for h in HALVES
        )
        lines.append(f"| {title} | {' | '.join(cells)} |")

    lines.append(f"| sound corpora | {' | '.join(str(counts[h, 'sound', 'corpora']) for h in HALVES)} |")
    row("examinations of them: false alarms", "sound", "examinations", "accused")
    kinds = dict.fromkeys(kind for _, kind, what in counts if what == "planted")
    for kind in kinds:
        row(f"missed: {kind}", kind, "planted", "missed")
    lines += [
        "",
        f"Tokenizers ({len(names)}; thresholds set on the **bold** ones): {_bold(names, seen[0])}.",
        f"Texts ({len(scripts)}): {_bold(scripts, seen[1])}.",
    ]
    return "\n".join(lines)


def _bold(names: list[str], some: set[str]) -> str:
    return ", ".join(f"**{n}**" if n in some else n for n in names)


if __name__ == "__main__":
    main()
