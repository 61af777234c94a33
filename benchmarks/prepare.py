"""How much of the tokenizers library's own speed `entasis data prepare` reaches, in one run on one machine.

    .venv/bin/python benchmarks/prepare.py

Both tokenise the same documents with the same tokenizer on the same cores, alternating; the library only calls
`encode_batch` on text that is already in memory, in the batches that `prepare` uses. `prepare` is measured whole
(reading, near-duplicates, splitting, shards synced to disk) and in its tokenising phase alone.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import tokenizers
from common import write

from entasis.data import tokenizer
from entasis.data.prepare import _BATCH_BYTES, prepare
from entasis.data.sources import TextSources

LIMIT = 12_000_000
ROUNDS = 7


def main() -> None:
    """Writes and prints benchmarks/results/prepare-TIME.json."""
    texts, size = [], 0
    for document in TextSources(("stdlib",)).documents():
        if size + len(document.text.encode()) > LIMIT:
            break
        texts.append(document.text)
        size += len(document.text.encode())
    chosen = tokenizer.train(texts[:200], 4096)
    rows = [round_of(texts, size, chosen) for _ in range(ROUNDS)]
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    write(
        "prepare",
        ["tokenizers", "numpy", "safetensors"],
        bytes=size,
        rounds=rows,
        megabytes_per_second={key: size / 1e6 / value for key, value in medians.items()},
        ratio_whole=medians["tokenizers_alone"] / medians["prepare_whole"],
        ratio_tokenising=medians["tokenizers_alone"] / medians["prepare_tokenising"],
    )


def round_of(texts: list[str], size: int, chosen: tokenizer.Tokenizer) -> dict[str, float]:
    """Seconds of one alternation."""
    fresh = tokenizers.Tokenizer.from_str(chosen.library.to_str())  # with an empty cache, as prepare's own is
    begun = time.perf_counter()
    batch: list[str] = []
    held = 0
    for text in [*texts, None]:
        if text is None or held >= _BATCH_BYTES:
            fresh.encode_batch_fast(batch, add_special_tokens=False)
            batch, held = [], 0
        if text is not None:
            batch.append(text)
            held += len(text)
    alone = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as folder:
        chosen.save(Path(folder) / "tokenizer.json")
        with (Path(folder) / "text.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        begun = time.perf_counter()
        source = [Path(folder) / "text.jsonl"]
        given = Path(folder) / "tokenizer.json"
        survey_over: list[float] = []

        def watch(phase: str, done: int, total: int) -> None:
            if phase == "survey":
                survey_over[:] = [time.perf_counter()]

        prepare(source, Path(folder) / "out", tokenizer=given, progress=watch)
        end = time.perf_counter()
    return {
        "tokenizers_alone": alone,
        "prepare_whole": end - begun,
        "prepare_tokenising": end - survey_over[0],
    }


if __name__ == "__main__":
    main()
