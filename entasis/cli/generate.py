"""Continue a text, or answer a message, with a trained or imported model.

examples:
  entasis generate runs/tiny --prompt "def main("
  entasis generate models/smollm2 --prompt "The capital of France is" --temperature 0 --tokens 8
  entasis generate models/smollm2 --chat --prompt "What is entasis in architecture?"
  echo "import os" | entasis generate runs/tiny --json
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from entasis.cli.numbers import real, seed, whole
from entasis.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a finished run, an imported model, a Hugging Face folder or a GGUF file",
    )
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be repeated; left out, standard input is read"
    )
    parser.add_argument("--chat", action="store_true", help="a prompt is a message: use the chat template")
    parser.add_argument("--system", metavar="TEXT", help="the system message before it (with --chat)")
    parser.add_argument("--tokens", type=whole(1), default=128, help="at most so many new tokens (128)")
    parser.add_argument("--temperature", type=real(0), default=0.8, help="0 takes the likeliest token (0.8)")
    parser.add_argument("--top-k", type=whole(1))
    parser.add_argument("--top-p", type=real(0, 1, open=True))
    parser.add_argument("--min-p", type=real(0, 1, open=True))
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print prompts, texts and speed as JSON")


def run(args: argparse.Namespace) -> int:
    from entasis.evaluate.generation import Sampling, generate
    from entasis.evaluate.loading import load

    if args.system is not None and not args.chat:
        raise UserError("--system goes with --chat")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.seed)
    loaded = load(args.model, device=args.device)
    chosen = loaded.tokenizer
    if chosen is None:
        raise UserError(f"{args.model}: has no tokenizer.json; import it again with --tokenizer FILE")
    texts = _prompts(args.prompt)
    if args.chat:
        if loaded.chat is None:
            raise UserError(f"{args.model}: has no chat template; leave --chat out to continue the text")
        system = [{"role": "system", "content": args.system}] if args.system is not None else []
        whole = [loaded.chat.render([*system, {"role": "user", "content": text}]) for text in texts]
    else:
        whole = texts
    # A template writes what stands in front itself.
    encode = chosen.encode if args.chat else loaded.encode
    prompts = [encode(text) or [chosen.end_of_text or 0] for text in whole]
    answers: list[list[int]] = [[] for _ in prompts]
    stream = len(prompts) == 1 and not args.json
    before = [] if args.chat else prompts[0]  # an answer is shown alone, a continuation with its beginning
    shown = chosen.decode(before)
    steps = generate(loaded.model, prompts, tokens=args.tokens, sampling=sampling, stop=loaded.stop)
    if stream:
        print("" if args.chat else chosen.decode(chosen.encode(texts[0])), end="", flush=True)
    begun = time.perf_counter()
    for step in steps:
        for answer, token in zip(answers, step, strict=True):
            if token is not None:
                answer.append(token)
        if stream:
            now = chosen.decode([*before, *answers[0]])
            if not now.endswith("\ufffd"):  # the rest of a character may be still to come
                print(now[len(shown) :], end="", flush=True)
                shown = now
    seconds = time.perf_counter() - begun

    def said(prompt: list[int], answer: list[int]) -> str:
        return chosen.decode(answer) if args.chat else chosen.continuation(prompt, answer)

    if args.json:
        continuations = [
            {"prompt": text, "text": said(prompt, answer), "tokens": answer}
            for text, prompt, answer in zip(texts, prompts, answers, strict=True)
        ]
        speed = sum(map(len, answers)) / seconds
        print(json.dumps({"continuations": continuations, "tokens_per_second": speed}))
    elif stream:
        print()
    else:
        for text, prompt, answer in zip(texts, prompts, answers, strict=True):
            print(f"{'' if args.chat else text}{said(prompt, answer)}\n---")
    return 0


def _prompts(given: list[str] | None) -> list[str]:
    """The prompts of the command line, or standard input. Raises `UserError` for bytes that are not UTF-8."""
    texts = given
    try:
        if texts is None:
            texts = [sys.stdin.read()]
        for text in texts:
            text.encode()  # an argument's bytes that are not UTF-8 are surrogates by now
    except UnicodeError as error:
        raise UserError("a prompt is not UTF-8 text") from error
    return texts
