"""Prepare, import, inspect and examine corpora, and make tasks of held-out text.

examples:
  entasis data prepare stdlib --train-tokenizer 4096 --output corpora/stdlib
  entasis data prepare books/ --include '*.txt' --exclude 'drafts/*' --tokenizer bytes --output corpora/books
  entasis data prepare articles/ more.jsonl.zst --tokenizer tokenizer.json --output corpora/articles
  entasis data import old/train.bin --format nanogpt --dtype uint16 --tokenizer gpt2/ --output corpora/old
  entasis data inspect corpora/stdlib/train
  entasis data doctor old/train.bin --dtype uint16 --vocabulary 50257
  entasis data task corpora/stdlib/validation --items 200 --output tasks
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from entasis import progress
from entasis.cli.numbers import seed, whole
from entasis.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    prepare = verbs.add_parser("prepare", help="turn text into a corpus, split into train and validation")
    prepare.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="text files and folders, .jsonl, .ndjson or .json (.gz/.zst), .parquet, hf:NAME[:CONFIG[:SPLIT]], or stdlib: the "
        "interpreter's own standard library",
    )
    prepare.add_argument("--output", required=True, metavar="DIR")
    prepare.add_argument(
        "--tokenizer", metavar="PATH", help="tokenizer.json, folder with GPT-2's files, or `bytes`"
    )
    prepare.add_argument(
        "--train-tokenizer", type=whole(1), metavar="VOCABULARY", help="train a byte-level BPE here"
    )
    prepare.add_argument("--validation", default="5%", help="share of bytes held out, by document (5%%)")
    prepare.add_argument("--seed", type=seed, default=0, help="which documents are held out (0)")
    prepare.add_argument(
        "--limit", metavar="SIZE", help="at most so much text, whole documents, such as 12MB"
    )
    prepare.add_argument("--column", default="text", help="the text's key in jsonl and parquet (text)")
    prepare.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="in folders, read only files of these names or paths, whatever their suffix; may be repeated",
    )
    prepare.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="in folders, leave these files out"
    )
    prepare.add_argument(
        "--encoding-errors",
        choices=["drop-file", "replace"],
        default="drop-file",
        help="what becomes of text that is not UTF-8: its file (in jsonl its row) is left out, or the bytes become U+FFFD (drop-file)",
    )
    prepare.set_defaults(act=_prepare)

    bring = verbs.add_parser("import", help="bring in another project's token file")
    bring.add_argument("source", metavar="FILE")
    bring.add_argument(
        "--format",
        required=True,
        help="nanogpt, llm.c, megatron, npy or raw; corrupt:NAME corrupts a corpus on purpose",
    )
    bring.add_argument(
        "--dtype", help="type of the ids where the format does not say it: uint16, int32, uint16be, …"
    )
    bring.add_argument("--tokenizer", metavar="PATH", help="the tokenizer that made the ids")
    bring.add_argument("--output", required=True, metavar="DIR")
    bring.set_defaults(act=_import)

    inspect = verbs.add_parser("inspect", help="say what a corpus holds")
    inspect.add_argument("corpus", metavar="DIR")
    inspect.set_defaults(act=_inspect)

    doctor = verbs.add_parser("doctor", help="examine token data: exit code 0 sound, 1 corrupt")
    doctor.add_argument("path", metavar="FILE|DIR")
    doctor.add_argument("--dtype", help="type of a raw file's ids")
    doctor.add_argument("--vocabulary", type=whole(1), help="number of ids that the tokenizer has")
    doctor.add_argument("--tokenizer", metavar="PATH", help="the tokenizer that should have made the ids")
    doctor.set_defaults(act=_doctor)

    task = verbs.add_parser("task", help="a multiple-choice task for lm-eval: which continuation follows?")
    task.add_argument("text", metavar="TEXT", help="a held-out corpus, a text file or a folder of them")
    task.add_argument("--output", required=True, metavar="DIR", help="for `entasis evaluate --include-path`")
    task.add_argument("--column", default="text", help="the text's key in jsonl and parquet (text)")
    task.add_argument("--items", type=whole(1), default=200, help="how many questions (200)")
    task.add_argument("--context", type=whole(1), default=40, metavar="WORDS", help="words before each (40)")
    task.add_argument("--continuation", type=whole(1), default=10, metavar="WORDS", help="words of each (10)")
    task.add_argument("--seed", type=seed, default=0, help="which stretches of the text are drawn (0)")
    task.add_argument("--name", default="continuation", help="what lm-eval calls it (continuation)")
    task.set_defaults(act=_task)
    for verb in (prepare, bring, inspect, doctor, task):
        verb.add_argument("--json", action="store_true", help="print the answer as JSON")


def run(args: argparse.Namespace) -> int:
    return args.act(args)


def _prepare(args: argparse.Namespace) -> int:
    from entasis.data import left_out
    from entasis.data.prepare import SIDES, prepare

    with progress.bars("bytes") as report:
        result = prepare(
            args.sources,
            args.output,
            tokenizer=args.tokenizer,
            train_tokenizer=args.train_tokenizer,
            validation=_share(args.validation),
            seed=args.seed,
            limit=_size(args.limit),
            column=args.column,
            include=args.include,
            exclude=args.exclude,
            encoding_errors=args.encoding_errors,
            progress=report,
        )
    if note := result.get("note"):
        print(f"entasis: {note}", file=sys.stderr)
    left_out.tell(result.get("left_out", {}))
    # Folders of earlier versions do not say it.
    if lost := left_out.lost_by_tokenizer(max(result[s].get("text_lost") or 0 for s in SIDES if s in result)):
        print(f"entasis: {lost}", file=sys.stderr)
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{result['output']}: vocabulary {result['vocabulary']:,}, tokenizer {result['tokenizer'][:12]}")
    for side in ("train", "validation"):
        if part := result.get(side):
            print(
                f"  {side:10} {part['documents']:>9,} documents {part['tokens']:>13,} tokens "
                f"{part['bytes'] / 1e6:>9,.1f} MB  {part['bytes'] / part['tokens']:.2f} bytes/token  "
                f"{part['fingerprint'][:12]}"
            )
    if alike := result.get("near_duplicates"):
        print(f"  {left_out.counted('near-duplicates kept on one side', alike)}")
    return 0


def _import(args: argparse.Namespace) -> int:
    from entasis.data import corruption
    from entasis.data.importers import import_tokens

    if args.format.startswith("dangerous:"):
        raise UserError(f"--format dangerous: is called {corruption.PREFIX} now")
    if args.format.startswith(corruption.PREFIX):
        result = corruption.corrupt(args.source, args.output, args.format.removeprefix(corruption.PREFIX))
        said = f"{args.output}: {result['tokens']:,} ids, corrupted on purpose"
        print(json.dumps(result) if args.json else said)
        return 0
    if args.tokenizer is None:
        raise UserError("--tokenizer is missing; name the tokenizer that made the ids")
    with progress.bars("bytes") as report:
        result = import_tokens(
            args.source,
            args.output,
            format=args.format,
            dtype=args.dtype,
            tokenizer=args.tokenizer,
            progress=report,
        )
    if note := result.get("note"):
        print(f"entasis: {note}", file=sys.stderr)
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"{args.output}: {result['documents']:,} documents, {result['tokens']:,} tokens, {result['bytes'] / 1e6:,.1f} MB"
        )
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from entasis.data import tokenizer
    from entasis.data.corpus import Corpus

    corpus = Corpus(args.corpus)
    beginning = tokenizer.load(corpus.tokenizer_path).decode(corpus.read(0, min(64, corpus.tokens)))
    answer = {
        "documents": corpus.documents,
        "tokens": corpus.tokens,
        "bytes": corpus.bytes,
        "bytes_per_token": corpus.bytes / max(1, corpus.tokens),
        "vocabulary": corpus.vocabulary,
        "dtype": str(corpus.dtype),
        "shards": len(corpus.shards),
        "end_of_text": corpus.end_of_text,
        "tokenizer": corpus.tokenizer_hash,
        "fingerprint": corpus.fingerprint,
        "beginning": beginning,
    }
    if args.json:
        print(json.dumps(answer))
        return 0
    for name, value in answer.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        print(
            f"{name.replace('_', ' '):16} {value:.3f}"
            if isinstance(value, float)
            else f"{name.replace('_', ' '):16} {shown}"
        )
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from entasis.data.doctor import examine

    diagnosis = examine(args.path, args.dtype, args.vocabulary, args.tokenizer, thorough=True)
    if args.json:
        print(json.dumps({**dataclasses.asdict(diagnosis), "sound": diagnosis.sound}))
    elif diagnosis.sound:
        print(f"{args.path}: sound ({diagnosis.tokens:,} tokens)")
    else:
        for finding in diagnosis.findings:
            print(f"{args.path}: {finding.name}\n  evidence: {finding.evidence}\n  fix: {finding.fix}")
    if not args.json:
        for note in diagnosis.notes:
            print(f"  note: {note}")
    return 0 if diagnosis.sound else 1


def _task(args: argparse.Namespace) -> int:
    from entasis.data.continuations import texts_of, write_task

    result = write_task(
        texts_of(args.text, column=args.column),
        args.output,
        where=args.text,
        items=args.items,
        context=args.context,
        continuation=args.continuation,
        seed=args.seed,
        name=args.name,
    )
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"{args.output}: task {args.name} of {result['items']:,} items; the text has room for "
            f"{result['possible_items']:,}, of {result['documents']:,} documents"
        )
    return 0


def _share(text: str) -> float:
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise UserError(f"--validation is {text!r}; write a share such as 5% or 0.05") from error


def _size(text: str | None) -> int | None:
    if text is None:
        return None
    from entasis.shape.specification import number

    try:
        return number(text.upper().removesuffix("B"), "")
    except UserError as error:
        raise UserError(f"--limit is {text!r}; write a size such as 12MB") from error
