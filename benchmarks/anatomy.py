"""What does carrying the residual stream save over ablating layer by layer?

    python benchmarks/anatomy.py [--layers 30] [--d-model 192] [--vocabulary 4096] [--tokens 2048]

Skips every layer of a model at its initial values (the time does not depend on them), once by the sweep and once by a
forward pass without each layer, on the same windows. Writes benchmarks/results/anatomy-TIME.json.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from common import write

from entasis.anatomy import runner
from entasis.anatomy.diagnostics import ablation
from entasis.anatomy.layer_sweep import score_model
from entasis.anatomy.subject import Subject
from entasis.anatomy.text import Text
from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.shape.shapes import LayerShape, ModelShape


def naive(subject: Subject) -> np.ndarray:
    """The loss without each layer and with all, one forward pass each."""
    blocks = subject.model.blocks
    rows = []
    for layer in range(len(blocks)):
        subject.model.blocks = torch.nn.ModuleList(b for i, b in enumerate(blocks) if i != layer)
        rows.append(score_model(subject))
    subject.model.blocks = blocks
    return np.stack([*rows, score_model(subject)])


def timed(function) -> tuple[float, np.ndarray]:
    started = time.process_time()
    result = function()
    return time.process_time() - started, result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--d-model", type=int, default=192)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    shape = ModelShape(
        d_model=args.d_model, head_dim=64, vocabulary=args.vocabulary, tied_embeddings=True,
        layers=(LayerShape(args.d_model // 64, args.d_model // 64, args.d_model * 8 // 3),) * args.layers,
    )  # fmt: skip
    model = Transformer(shape)
    init_weights(model, 0)
    stream = np.random.default_rng(0).integers(0, args.vocabulary, args.tokens + 1)
    text = Text(stream, np.zeros(args.tokens, int), np.array([args.tokens]), ("random",), runner.SEQUENCE)
    subject = Subject(model.eval(), text)
    count = 0

    def one_more(*_: object) -> None:
        nonlocal count
        count += 1

    for block in model.blocks:
        block.register_forward_hook(one_more)
    score_model(subject)
    figures = {}
    for name, function in (
        ("sweep", lambda: ablation.skip.sweep(subject)),
        ("naive", lambda: naive(subject)),
    ):
        count = 0
        seconds, found = timed(function)
        figures[name] = {"seconds": round(seconds, 2), "block_evaluations": count}
        figures[name]["losses"] = found
    np.testing.assert_allclose(figures["sweep"].pop("losses"), figures["naive"].pop("losses"), rtol=1e-5)
    batches = len(list(subject.batches()))
    write(
        "anatomy", ["torch", "entasis"], layers=args.layers, d_model=args.d_model, vocabulary=args.vocabulary,
        tokens=args.tokens, threads=torch.get_num_threads(), clock="processor seconds of the process", **figures,
        share_of_naive_seconds=round(figures["sweep"]["seconds"] / figures["naive"]["seconds"], 3),
        blocks_per_full_forwards=round(
            figures["sweep"]["block_evaluations"] / (batches * args.layers * args.layers), 3
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
