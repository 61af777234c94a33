"""Hand a model to the tools that serve it.

examples:
  entasis export runs/tiny --to hf --output exported/tiny
  entasis export runs/tiny --to gguf --dtype q8_0 --output exported/tiny-gguf
  entasis export imported/smollm2 --to padded --output exported/smollm2

  hf      transformers: a plain folder where layers are equal, with its own modeling file where they differ
  gguf    llama.cpp, layers that differ included
  padded  every layer zero-padded to the widest: opens everywhere, gives up the savings
"""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="a finished run or an imported model")
    parser.add_argument("--to", required=True, help="hf, gguf or padded")
    parser.add_argument("--output", required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument("--dtype", default="f32", help="f32 (default), f16, bf16; gguf also q8_0")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    from entasis.interop.exporting import export

    answer = export(args.model, args.output, to=args.to, dtype=args.dtype)
    if args.json:
        print(json.dumps(answer))
    else:
        what = answer.get("class") or f"arch {answer['architecture']}, {answer['file']}"
        held, own = answer["parameters"], answer["model_parameters"]
        zeros = "" if held == own else f" ({own:,} of the model and {held - own:,} zeros)"
        print(f"{args.output}: {what}, {answer['dtype']}, {held:,} parameters{zeros}")
        if kept := answer.get("kept_in_f16"):
            print(f"  f16 instead of {answer['dtype']}, as rows are no whole blocks of 32: {', '.join(kept)}")
    return 0
