"""Continue a text with a trained or imported model.

examples:
  entasis generate runs/tiny --prompt "def main("
  entasis generate models/smollm2 --prompt "The capital of France is" --temperature 0 --tokens 8
  echo "import os" | entasis generate runs/tiny --json
"""

from __future__ import annotations

import argparse
import json
import sys
import time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="a finished run or an imported model")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be repeated; left out, standard input is read"
    )
    parser.add_argument("--tokens", type=int, default=128, help="at most so many new tokens (128)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (0.8)")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print prompts, texts and speed as JSON")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    import torch

    from entasis.data import tokenizer
    from entasis.errors import UserError
    from entasis.evaluate.generation import Sampling, generate
    from entasis.model import weights

    if args.tokens < 1:
        raise UserError(f"--tokens is {args.tokens}; it must be at least 1")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.seed)
    model = weights.load(args.model, device=device)
    chosen = tokenizer.load(Path(args.model) / "tokenizer.json")
    texts = args.prompt or [sys.stdin.read()]
    prompts = [chosen.encode(text) or [chosen.end_of_text or 0] for text in texts]
    answers: list[list[int]] = [[] for _ in prompts]
    stream = len(prompts) == 1 and not args.json
    shown = chosen.decode(prompts[0])
    if stream:
        print(shown, end="", flush=True)
    begun = time.perf_counter()
    for step in generate(model, prompts, tokens=args.tokens, sampling=sampling, stop=chosen.end_of_text):
        for answer, token in zip(answers, step, strict=True):
            if token is not None:
                answer.append(token)
        if stream:
            whole = chosen.decode([*prompts[0], *answers[0]])
            if not whole.endswith("\ufffd"):  # the rest of a character may be still to come
                print(whole[len(shown) :], end="", flush=True)
                shown = whole
    seconds = time.perf_counter() - begun
    if args.json:
        continuations = [
            {"prompt": text, "text": chosen.decode(answer), "tokens": answer}
            for text, answer in zip(texts, answers, strict=True)
        ]
        speed = sum(map(len, answers)) / seconds
        print(json.dumps({"continuations": continuations, "tokens_per_second": speed}))
    elif stream:
        print()
    else:
        for text, answer in zip(texts, answers, strict=True):
            print(f"{text}{chosen.decode(answer)}\n---")
    return 0
