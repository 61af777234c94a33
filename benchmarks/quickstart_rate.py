"""Which learning rate suits the quickstart? Tried on a split of its training text, never on its held-out text.

    python benchmarks/quickstart_rate.py --output DIR [lr:base_width …]

Prepares the quickstart's corpus, splits its training part once more by another seed, and trains the baseline and the
crown at each rate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

from entasis.data import prepare, tokenizer
from entasis.data.corpus import Corpus
from entasis.study import study_files

ARMS = {"isotropic": {}, "crown": {"shape.profile": "crown"}}
RATES = ["3e-3:16", "6e-3:16", "12e-3:16", "1.5e-3:64", "3e-3:64", "6e-3:64"]


def main() -> None:
    """Prints the mean score of every shape at every rate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rates", nargs="*", default=RATES, metavar="lr:base_width")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    split(args.output)
    for rate in args.rates:
        lr, width = rate.split(":")
        folder = args.output / f"lr-{lr}-base-width-{width}"
        changes = [f"base.optimizer.lr={lr}", f"base.optimizer.base_width={width}", f"seeds={args.seeds}"]
        changes += [
            f"arms={json.dumps(ARMS)}",
            "corpora={}",
            "base.precision=fp32",
            "base.evaluation.tokens=null",
        ]
        changes += [
            f"base.data.{part}={args.output.resolve()}/split/{part}" for part in ("train", "validation")
        ]
        run = ["study", "run", "quickstart", *changes, "--output", str(folder), "--json"]
        subprocess.run([sys.executable, "-m", "entasis", *run], check=True, stdout=subprocess.DEVNULL)
        scores = {
            arm: [
                json.loads(path.read_text(encoding="utf-8"))["validation"]["bits_per_byte"]
                for path in sorted(folder.glob(f"runs/{arm}/seed-*/result.json"))
            ]
            for arm in ARMS
        }
        print(rate, {arm: [round(s, 4) for s in found] for arm, found in scores.items()}, flush=True)


def split(folder: Path) -> None:
    """`folder/split`: the quickstart's training documents, split once more, in its own vocabulary."""
    if (folder / "split").is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    made = study_files.read("quickstart").corpora["stdlib"]
    whole = folder / "stdlib"
    prepare.prepare(
        made.sources,
        whole,
        train_tokenizer=made.train_tokenizer,
        validation=made.validation,
        limit=made.limit,
    )
    corpus = Corpus(whole / "train")
    read, offsets = tokenizer.load(corpus.tokenizer_path), corpus.document_offsets()
    with (folder / "training.jsonl").open("w", encoding="utf-8") as out:
        for start, stop in itertools.pairwise(offsets):
            text = read.decode(corpus.read(int(start), int(stop))).replace("<|endoftext|>", "")
            out.write(json.dumps({"text": text}) + "\n")
    prepare.prepare(
        [str(folder / "training.jsonl")],
        folder / "split",
        tokenizer=str(corpus.tokenizer_path),
        validation=made.validation,
        seed=1,
    )


if __name__ == "__main__":
    main()
