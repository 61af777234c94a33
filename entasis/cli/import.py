"""Import someone's checkpoint: a Hugging Face folder (config.json and safetensors) or a GGUF file.

The result is a folder with model.safetensors, shape.json, the tokenizer and where all of it came from.
Memory stays at about the largest tensor. Nothing is unpickled and no code of the source is run.

example: entasis import SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2
         entasis import Llama-3.2-1B/ models/llama --dtype bfloat16 --json
"""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "source", metavar="SOURCE", help="a Hugging Face folder, hf:ORGANISATION/MODEL, or a .gguf file"
    )
    parser.add_argument("folder", metavar="DIR", help="the folder to make; must not exist, or be empty")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the written weights (default: the source's; float32 where it is quantised)",
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json to use instead of the source's")
    parser.add_argument("--json", action="store_true", help="print what was imported as JSON")


def run(args: argparse.Namespace) -> int:
    """Imports, and says what came in."""
    from entasis import progress
    from entasis.interop.importing import import_model

    with progress.bars("parameters") as advance:
        result = import_model(
            args.source,
            args.folder,
            dtype=args.dtype,
            tokenizer=args.tokenizer,
            progress=lambda done, total: advance("importing", done, total),
        )
    if args.json:
        print(json.dumps(result.to_dict(), indent=2))
        return 0
    shape, has = result.shape, ("none", "yes")
    kinds = "equal" if shape.uniform else f"unequal ({shape.distinct_layers} kinds)"
    print(f"{result.folder}: {result.family} from {result.format}")
    print(f"  {result.parameters:,} parameters, {result.dtype}, {shape.n_layers} {kinds} layers")
    print(f"  d_model {shape.d_model}, vocabulary {shape.vocabulary}, context {shape.context}")
    print(f"  tokenizer: {has[result.tokenizer]}, chat template: {has[result.chat_template]}")
    for note in result.notes:
        print(f"  note: {note}")
    return 0
