"""How long Muon's orthogonalisation takes: torch's, ours one by one, ours in batches; interleaved in one run.

    .venv/bin/python benchmarks/muon.py [--device cuda] [--threads 1]

Batches are of equal shapes, or of unequal shapes padded with zeros as long as that costs at most a tenth more
arithmetic. Padding is exact: the zeros stay zeros. torch's always computes in bf16; on a CPU ours computes in fp32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import write

from entasis.model.transformer import Transformer
from entasis.shape import specification
from entasis.train.muon import _A, _B, _C, _STEPS, orthogonalise

SHAPES = {
    "crown 6 x 128": {"profile": "crown", "budget": "1.6M", "layers": 6, "d_model": 128, "head_dim": 32},
    "crown 8 x 192": {"profile": "crown", "budget": "4M", "layers": 8, "d_model": 192, "head_dim": 32},
}
ROUNDS = 3


def main() -> None:
    """Writes and prints benchmarks/results/muon-TIME.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    figures = {}
    for name, spec in SHAPES.items():
        shape = specification.resolve({**spec, "context": 256, "vocabulary": 4096}).shape
        with torch.device("meta"):
            model = Transformer(shape)
        drawn = torch.Generator(args.device).manual_seed(0)
        matrices = [
            torch.randn(p.shape, generator=drawn, device=args.device)
            for n, p in model.named_parameters()
            if n.startswith("blocks.") and p.ndim == 2
        ]
        figures[name] = measure(matrices, dtype)
    write("muon", ["torch"], threads=args.threads, dtype=str(dtype), rounds=ROUNDS, shapes=figures)


def measure(matrices: list[torch.Tensor], dtype: torch.dtype) -> dict[str, object]:
    """Median seconds of each way, and torch's over each."""
    from torch.optim._muon import _zeropower_via_newtonschulz as library

    ways: dict[str, Callable[[], object]] = {
        "torch": lambda: [library(m, (_A, _B, _C), _STEPS, 1e-7) for m in matrices],
        "one by one": lambda: [orthogonalise(m.to(dtype)) for m in matrices],
        "equal shapes": lambda: in_batches(matrices, dtype, waste=0.0),
        "padded": lambda: in_batches(matrices, dtype, waste=0.1),
    }
    alone = [orthogonalise(m.double()) for m in matrices]
    together = in_batches(matrices, torch.float64, waste=0.1)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(alone, together, strict=True))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, work in ways.items():
            begun = time.perf_counter()
            work()
            if matrices[0].is_cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "matrices": len(matrices),
        "distinct": len({tuple(sorted(m.shape)) for m in matrices}),
        "seconds": medians,
        "times_as_fast_as_torch": {name: medians["torch"] / value for name, value in medians.items()},
    }


def in_batches(matrices: list[torch.Tensor], dtype: torch.dtype, *, waste: float) -> list[torch.Tensor]:
    """`orthogonalise` of each, in batches padded with zeros at the cost of at most `waste` more arithmetic."""
    flat = [m.T if m.shape[0] > m.shape[1] else m for m in matrices]
    order = sorted(range(len(flat)), key=lambda i: tuple(flat[i].shape))
    batches: list[list[int]] = []
    for i in order:
        wider = [*batches[-1], i] if batches else [i]
        rows, columns = (max(flat[j].shape[side] for j in wider) for side in (0, 1))
        needed = sum(work(*flat[j].shape) for j in wider)
        if batches and len(wider) * work(rows, columns) <= (1 + waste) * needed:
            batches[-1] = wider
        else:
            batches.append([i])
    result: list[torch.Tensor] = [torch.empty(0)] * len(flat)
    for batch in batches:
        rows, columns = (max(flat[j].shape[side] for j in batch) for side in (0, 1))
        x = torch.zeros(len(batch), rows, columns, dtype=dtype, device=flat[0].device)
        for row, j in zip(x, batch, strict=True):
            row[: flat[j].shape[0], : flat[j].shape[1]] = flat[j]
        x = x / x.norm(dim=(1, 2), keepdim=True)
        for _ in range(_STEPS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
        for row, j in zip(x, batch, strict=True):
            y = row[: flat[j].shape[0], : flat[j].shape[1]]
            result[j] = y.T if matrices[j].shape[0] > matrices[j].shape[1] else y
    return result


def work(rows: int, columns: int) -> int:
    """Multiplications of one step."""
    return 2 * rows * rows * columns + rows**3


if __name__ == "__main__":
    main()
