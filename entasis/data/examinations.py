"""What the doctor looks for: one registered function for each fault.

The thresholds were set on half of the tokenizers and texts of `benchmarks/doctor_matrix.py`; docs/data.md has what
was counted on the other half.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from entasis.data import round_trip
from entasis.data import tokenizer as tokenizers

_FEWEST = 16
"""Below so many tokens there is no statistical evidence."""
_MOST = 1 << 24
"""No tokenizer has so many ids."""


@dataclass(frozen=True)
class Finding:
    """One fault: its name, what shows it, and what to do."""

    name: str
    evidence: str
    fix: str


@dataclass(frozen=True)
class Sample:
    """What an examination sees: a sample of the ids as read, the range of all, and what is known about them."""

    ids: np.ndarray
    lowest: int
    highest: int
    vocabulary: int | None
    tokenizer: tokenizers.Tokenizer | None


Examination = Callable[[Sample], Iterator[Finding]]
EXAMINATIONS: list[Examination] = []


def examination(look: Examination) -> Examination:
    """Registers an examination."""
    EXAMINATIONS.append(look)
    return look


@examination
def swallowed_header(sample: Sample) -> Iterator[Finding]:
    """A file format's header read as if it were tokens."""
    start = np.ascontiguousarray(sample.ids[:4096]).astype(sample.ids.dtype).tobytes()
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
def filled(sample: Sample) -> Iterator[Finding]:
    """Nothing at all, one id only, or a large part that was never written."""
    ids = sample.ids
    if not len(ids):
        yield Finding("no tokens", "there is not one id in it", "write the file again")
        return
    if len(ids) < _FEWEST:
        return
    if sample.lowest == sample.highest:
        evidence = f"all ids are {sample.lowest}"
        yield Finding("one id only", evidence, "write the file again")
        return
    if _explained(sample, wider_read_as_narrower):
        return
    # Text in which a zero is frequent has it between others ("A,C,G,T"); memory that was not written is all zeros.
    zero = ids == 0
    pairs = float((zero[1:] & zero[:-1]).mean())
    edges = np.flatnonzero(np.diff(ids))
    longest = int(np.diff(np.concatenate([[-1], edges, [len(ids) - 1]])).max())
    if len(ids) >= 64 and pairs > 0.15:
        evidence = f"{zero.mean():.1%} of the ids are zero, {pairs:.1%} stand beside another zero"
        yield Finding("filled with zeros", evidence, "write the file again; part of it was never written")
    elif longest > max(1024, 0.05 * len(ids)):
        evidence = f"one id stands {longest} times in succession"
        yield Finding("filled with one id", evidence, "write the file again; part of it was never written")


@examination
def floating_point(sample: Sample) -> Iterator[Finding]:
    """Ids that were stored as floating-point numbers."""
    data = np.ascontiguousarray(sample.ids)
    if len(data) < _FEWEST:
        return
    for kind, name in (("<f8", "float64"), ("<f4", "float32"), ("<f2", "float16")):
        size = np.dtype(kind).itemsize
        raw = data.view(np.uint8)
        with np.errstate(invalid="ignore"):
            numbers = raw[: len(raw) // size * size].view(kind).astype(np.float64)
            whole = (numbers >= 1) & (numbers < _MOST) & (numbers == np.floor(numbers))
        if whole.mean() > 0.5 and (whole | (numbers == 0)).mean() > 0.99:
            evidence = f"read as {name}, {whole.mean():.1%} of the numbers are whole ones such as {numbers[whole][0]:.0f}"
            yield Finding(
                "ids stored as floating point", evidence, "write them as integers; large ones were rounded"
            )
            return


@examination
def noise(sample: Sample) -> Iterator[Finding]:
    """Random bytes, or weights: their halves above and below the sign bit look the same, ids' never do."""
    ids = sample.ids
    width = ids.dtype.itemsize
    if len(ids) < _FEWEST:
        return
    if width == 1:
        counts = np.bincount(ids.view(np.uint8), minlength=256)
        spread = 256 * float((counts * (counts - 1)).sum()) / (len(ids) * (len(ids) - 1))
        if len(ids) >= 1024 and spread < 1.3:
            evidence = f"all 256 values are equally frequent (collisions {spread:.2f} times those of chance)"
            yield Finding("no token ids", evidence, "this is noise or compressed data; name the right file")
        return
    if width > 2:
        beyond = float(((ids < 0) | (ids >= _MOST)).mean())
        if (
            beyond > 0.02
            and sample.vocabulary is None
            and not _explained(sample, narrower_read_as_wider, swapped_bytes)
        ):
            evidence = f"{beyond:.1%} of the ids are negative or above 2^24; no tokenizer has so many"
            yield Finding("no token ids", evidence, "name the right file and --dtype")
        return
    plain = ids.astype(ids.dtype.newbyteorder("=")).view(np.uint16)
    for stride in (1, 2, 4):
        for lane in (plain[k::stride] for k in range(stride)):
            if len(lane) < 2048:
                return
            above = lane >= 1 << 15
            if 0.35 < above.mean() < 0.65:
                bins = (lane >> 10) & 31
                same = _overlap(
                    np.bincount(bins[above], minlength=32), np.bincount(bins[~above], minlength=32)
                )
                if same > 0.85:
                    evidence = (
                        f"{above.mean():.1%} of the numbers{'' if stride == 1 else f' in one of {stride} columns'} "
                        f"have their highest bit set, and the others are spread alike ({same:.0%}): noise or weights"
                    )
                    yield Finding("no token ids", evidence, "name the right file and --dtype")
                    return


def _explained(sample: Sample, *looks: Examination) -> bool:
    """Whether another examination says more exactly what is wrong."""
    return any(True for look in looks for _ in look(sample))


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """What two histograms share: 0 … 1."""
    return float(np.minimum(a / max(1, a.sum()), b / max(1, b.sum())).sum())


@examination
def wider_read_as_narrower(sample: Sample) -> Iterator[Finding]:
    """32- or 64-bit ids read as 16- or 32-bit ones: every other number is (nearly) always zero."""
    ids = sample.ids
    width = ids.dtype.itemsize
    if len(ids) < _FEWEST or width > 4:
        return
    for stride in (4, 2):
        n = len(ids) // stride * stride
        lanes = [ids[k:n:stride].astype(np.int64) for k in range(stride)]
        if n < _FEWEST or width * stride > 8:
            continue
        # The high half of an id below 2^20 is below 16, and often zero; the low half of ids spreads far beyond.
        zeros = [float((lane == 0).mean()) for lane in lanes]
        # Read in the other byte order, what is below 16 is a multiple of 2^8 or 2^24 below 16 times that.
        turned = [ids[k:n:stride].byteswap().astype(np.int64) for k in range(stride)]
        small = [
            bool(max((lane < 16).mean(), (other < 16).mean()) > 0.98 and z > 0.2)
            for lane, other, z in zip(lanes, turned, zeros, strict=True)
        ]
        spread = [bool((lane >= 16).mean() > 0.3) and not s for lane, s in zip(lanes, small, strict=True)]
        if sum(spread) == 1 and sum(small) == stride - 1:
            low = spread.index(True)
            quiet = [f"{z:.1%}" for k, z in enumerate(zeros) if k != low]
            bits = 8 * width * stride
            evidence = (
                f"of every {stride} numbers {stride - 1} {'is' if stride == 2 else 'are'} almost always below 16 "
                f"({', '.join(quiet)} zeros there, {zeros[low]:.1%} in the rest): {bits}-bit ids read as "
                f"{ids.dtype.newbyteorder('=')}"
            )
            order = "be" if low == stride - 1 else ""
            fix = f"import the file with --dtype {'int' if bits == 64 else 'uint'}{bits}{order}"
            yield Finding("wider ids read as narrower", evidence, fix)
            return


@examination
def narrower_read_as_wider(sample: Sample) -> Iterator[Finding]:
    """Two narrow ids read as one wide id: both halves are ids, so both are spread alike."""
    ids = sample.ids
    width = ids.dtype.itemsize
    if width == 1 or len(ids) < _FEWEST:
        return
    half = 4 * width
    values = ids.astype(ids.dtype.newbyteorder("=")).view(f"u{width}")
    high, low = values >> half, values & ((1 << half) - 1)
    used = float((high > 0).mean())
    wrong = width == 4 and (high >= 16).mean() > 0.5 and (low >= 16).mean() > 0.5
    if len(ids) >= 512 and used > 0.3:
        both = [np.bincount((part & 0xFF).astype(np.int64), minlength=256) for part in (high, low)]
        # And in the largest vocabularies too the frequent ids (blanks, ends of lines, bytes) are low ones.
        wrong = wrong or _overlap(*both) > 0.8 or (width > 2 and used > 0.99)
    if wrong:
        evidence = f"{used:.1%} of the ids have something in their upper {half} bits, the largest is {int(values.max())}"
        yield Finding("narrower ids read as wider", evidence, f"import the file with --dtype uint{half}")


@examination
def swapped_bytes(sample: Sample) -> Iterator[Finding]:
    """Big-endian ids read as little-endian."""
    ids, vocabulary = sample.ids, sample.vocabulary
    if len(ids) < _FEWEST or ids.dtype.itemsize == 1:
        return
    native = ids.astype(ids.dtype.newbyteorder("="))
    swapped = native.byteswap()
    if ids.dtype.itemsize > 2:
        beyond = float(((native < 0) | (native >= _MOST)).mean())
        wrong = beyond > 0.5 and int(swapped.max()) < _MOST and int(swapped.min()) >= 0
        evidence = f"{beyond:.1%} of the ids are above 2^24, swapped none is"
    elif vocabulary is not None and vocabulary < 1 << 16 and sample.highest >= vocabulary:
        wrong = int(swapped.max()) < vocabulary
        beyond = float((native.astype(np.int64) >= vocabulary).mean())
        evidence = f"{beyond:.1%} of the ids are outside the vocabulary of {vocabulary}, swapped none is"
    else:
        # Frequent ids are low ones, so the high byte is the more predictable of the two, and no id is near 65536;
        # swapped, those below 256 become its multiples.
        high, low = _entropy((native >> 8) & 0xFF), _entropy(native & 0xFF)
        turned = native[(native & 0xFF) == 0]
        many = len(turned) > 0.05 * len(ids) and len(turned) > 4 * int(((native >> 8) == 0).sum())
        wrong = len(ids) >= 1024 and (
            (high > low + 0.5 and int(swapped.max()) < int(native.max()))
            or (many and len(np.unique(turned)) > 2)
        )
        evidence = (
            f"the high byte carries {high:.1f} bits, the low byte {low:.1f} and is zero in "
            f"{len(turned) / len(ids):.1%}; in real ids it is the reverse"
        )
    if wrong:
        width = 8 * ids.dtype.itemsize
        big = ids.dtype.byteorder == ">"
        yield Finding(
            "swapped bytes", evidence, f"import the file with --dtype uint{width}{'' if big else 'be'}"
        )


@examination
def outside_the_vocabulary(sample: Sample) -> Iterator[Finding]:
    """Ids that the tokenizer does not have, and vocabularies that the ids cannot hold."""
    ids, vocabulary = sample.ids, sample.vocabulary
    if not len(ids):
        return
    low, high = sample.lowest, sample.highest
    if low < 0:
        share = (ids < 0).mean()
        evidence = f"{share:.2%} of the ids are negative: ids from {1 << (8 * ids.dtype.itemsize - 1)} upwards wrapped in {ids.dtype}"
        yield Finding("wrapped ids", evidence, "tell an unsigned --dtype, or tokenise again into a wider one")
    elif vocabulary is None:
        return
    elif ids.dtype.itemsize == 2 and vocabulary > 1 << 16:
        evidence = (
            f"a vocabulary of {vocabulary} does not fit into 16 bits: ids from 65536 upwards have wrapped"
        )
        yield Finding(
            "wrapped ids", evidence, "tokenise the text again into 32-bit ids; the lost bits are lost"
        )
    elif (
        high < 1 << 16
        and vocabulary >= 70_000
        and (used := len(np.unique(ids[ids >= 1 << 15]))) >= 100
        and (used >= 500 or (1 << 16) - high < 6 * (1 << 15) / used)
    ):
        # Text that uses many of the rarer ids does not stop at 2^16. Numbers, or a few words, stop somewhere below.
        evidence = (
            f"{used} ids between 32768 and 65535 occur and none above, though the vocabulary has {vocabulary}"
        )
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
def wrong_tokenizer(sample: Sample) -> Iterator[Finding]:
    """Ids that, decoded, are no text, or that, encoded again, become other ids: another tokenizer made them."""
    chosen, ids = sample.tokenizer, sample.ids
    if chosen is None or len(ids) < 256 or int(ids.max()) >= chosen.vocabulary or int(ids.min()) < 0:
        return
    unknown = chosen.unknown
    missing = float((ids == unknown).mean()) if unknown is not None else 0.0
    if missing > 0.5:
        evidence = f"{missing:.1%} of the ids stand for what the tokenizer does not know"
        yield Finding("unknown text", evidence, "choose a tokenizer of bytes, or one trained on such text")
        return
    marks = [i for i, token in chosen.library.get_added_tokens_decoder().items() if token.special]
    marks = [i for i in marks if i not in (unknown, chosen.end_of_text)]
    if (special := float(np.isin(ids, marks).mean())) > 0.15:
        evidence = f"{special:.1%} of the ids are special tokens, which stand beside text and not for it"
        yield Finding("wrong tokenizer", evidence, "name the tokenizer that made the file")
        return
    kept, total, odd, characters, letters = 0, 0, 0, 0, ""
    for piece in round_trip.pieces(ids, chosen.end_of_text):
        piece, text = round_trip.whole_characters(chosen, piece)
        kept_here, total_here = 0, 1
        for reading in [text] if chosen.library.decoder else [text, round_trip.joined(chosen, piece)]:
            again = [i for i in chosen.encode(reading) if i != unknown]
            known = [i for i in piece if i != unknown]
            common = round_trip.common(known, again)
            # What the tokenizer did not know may have cost its neighbours their blanks.
            longest = max(common, max(len(known), len(again)) - 2 * (len(piece) - len(known)), 1)
            if common * total_here >= kept_here * longest:
                kept_here, total_here = common, longest
        kept, total = kept + kept_here, total + total_here
        odd += sum(c == "\ufffd" or (unicodedata.category(c) == "Cc" and not c.isspace()) for c in text)
        characters += len(text)
        letters += "".join(filter(str.isalpha, text))
    if total and kept / total < 0.975:
        evidence = f"decoded and encoded again, only {kept / total:.1%} of the ids come back"
        yield Finding("wrong tokenizer", evidence, "name the tokenizer that made the file")
    elif characters and odd / characters > 0.05:
        evidence = f"decoded, {odd / characters:.1%} of the characters are control characters or broken ones"
        yield Finding("wrong tokenizer", evidence, "name the tokenizer that made the file")
    elif len(letters) >= 256 and (changes := round_trip.changes_of_script(letters)) > 0.3:
        evidence = f"decoded, {changes:.1%} of the letters are of another script than the one before"
        yield Finding("wrong tokenizer", evidence, "name the tokenizer that made the file")


def _entropy(values: np.ndarray) -> float:
    counts = np.bincount(values.astype(np.int64).ravel(), minlength=256)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())
