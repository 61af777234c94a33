"""Score a model: bits per byte on any text, and lm-eval's tasks.

examples:
  entasis evaluate runs/tiny --text corpora/stdlib/validation
  entasis evaluate imported/smollm2 --text book.txt --sequence 512 --tokens 100k
  entasis evaluate imported/smollm2 --tasks my_task --include-path tasks/ --json

The model is a finished run, an imported model, a Hugging Face folder or a GGUF file.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from entasis.cli.numbers import amount, whole
from entasis.errors import UserError

if TYPE_CHECKING:
    from entasis.evaluate.loading import Loaded


TAKES = {
    "text": ("sequence", "tokens", "column", "document_masking"),
    "tasks": ("include_path", "limit", "fewshot"),
}
"""Which options are of which of the two."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--text", metavar="PATH", help="a corpus, a text file or a folder of them")
    parser.add_argument(
        "--sequence", type=whole(1), help="tokens read at once (the model's context, at most 1024)"
    )
    parser.add_argument(
        "--tokens",
        type=amount(1),
        help="whole documents up to so many tokens, such as 100k; a single one is cut there",
    )
    parser.add_argument("--column", help="the text's key in jsonl and parquet (text)")
    parser.add_argument(
        "--document-masking",
        action=argparse.BooleanOptionalAction,
        help="attention stays inside a document of --text (as the run was trained)",
    )
    parser.add_argument("--tasks", help="lm-eval tasks, separated by commas")
    parser.add_argument("--include-path", metavar="DIR", help="folder with lm-eval tasks of your own")
    parser.add_argument("--limit", type=whole(1), help="examples per task")
    parser.add_argument("--fewshot", type=whole(0), help="examples shown before each question")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    from entasis.evaluate.loading import load

    if not args.text and not args.tasks:
        raise UserError("say what to score: --text PATH, --tasks NAME, or both")
    for scored, options in TAKES.items():
        for option in options if getattr(args, scored) is None else ():
            if getattr(args, option) is not None:
                raise UserError(f"--{option.replace('_', '-')} belongs to --{scored}")
    loaded = load(args.model, device=args.device)
    answer: dict[str, Any] = {"model": args.model}
    if args.text:
        answer["text"] = _text(loaded, args)
    if args.tasks:
        try:
            from entasis.evaluate import harness
        except ImportError as error:
            raise UserError("--tasks needs the extra: pip install 'entasis[eval]'") from error
        answer["lm_eval"] = harness.run(
            loaded,
            args.tasks.split(","),
            include_path=args.include_path,
            limit=args.limit,
            fewshot=args.fewshot,
        )
    if args.json:
        print(json.dumps(answer, default=str))
        return 0
    if score := answer.get("text"):
        apart = "  documents masked" if score["document_masking"] else ""
        print(f"{score['bits_per_byte']:.4f} bits per byte  {_interval(score)}{apart}")
        print(
            f"perplexity {score['perplexity']:.3f} per token, {score['tokens']:,} tokens, {score['bytes']:,} bytes"
        )
    if "lm_eval" in answer:
        from lm_eval.utils import make_table

        print(make_table(answer["lm_eval"]))
    return 0


def _interval(score: dict[str, Any]) -> str:
    if score["interval"] is None:
        return "one document, too short for an interval"
    low, high = score["interval"]
    return f"95 % [{low:.4f}, {high:.4f}] over {score['interval_over']}"


def _text(loaded: Loaded, args: argparse.Namespace) -> dict[str, Any]:
    from entasis import progress
    from entasis.data.sources import COLUMN
    from entasis.evaluate.bits_per_byte import interval
    from entasis.evaluate.scoring import corpus_of, score

    if loaded.tokenizer is None:
        raise UserError(f"{args.model}: has no tokenizer.json, so no text can be scored")
    masking = loaded.document_masking if args.document_masking is None else args.document_masking
    with (
        corpus_of(args.text, loaded.tokenizer, column=args.column or COLUMN) as corpus,
        progress.bars("tokens") as advance,
    ):
        found = score(
            loaded,
            corpus,
            sequence=args.sequence,
            tokens=args.tokens,
            document_masking=masking,
            progress=lambda done, total: advance("scoring", done, total),
        )
    sampled, over = found, "documents"
    if found.blocks:
        # What holds for the rest of this text; another document may differ by more.
        sampled, size = found.blocks, int(found.blocks.document_tokens[0])
        over = f"{len(sampled.document_nll)} blocks of {size:,} tokens of one document"
    limits = interval(sampled)
    return {
        "bits_per_byte": found.bits_per_byte,
        "interval": limits,
        "interval_over": over if limits else None,
        "perplexity": found.perplexity,
        "nll": found.nll_sum,
        "tokens": found.tokens,
        "bytes": found.bytes,
        "documents": len(found.document_nll),
        "document_masking": masking,
        "text_lost": corpus.text_lost,
    }
