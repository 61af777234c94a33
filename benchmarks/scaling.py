"""Scaling on paper: what binds at 8, 64 and 1024 GPUs, from the cost model, datasheets and one speed.

    python benchmarks/scaling.py [--achieved 350]

Prints the tables of docs/scaling.md as Markdown. Nothing here is measured but what is handed in: `--achieved`, the
matmul TFLOP/s that one GPU makes of a step (`entasis bench` and benchmarks/gpu.py measure it: MFU times ceiling).
What crosses between GPUs is what the code sends: `ddp` sums fp32 gradients while the last micro-batch's backward pass
runs, each as soon as it is whole; `fsdp` and `hsdp` gather each block's bf16 parameters twice for a micro-batch, while
the block before it computes, and scatter fp32 gradients; `hsdp` sums its shares between machines in the last backward
pass. Embedding, final norm and head are gathered and scattered in fp32, and nothing hides them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import pairwise

from entasis.shape import cost
from entasis.shape.activations import layer_bytes_per_token
from entasis.shape.shapes import ModelShape
from entasis.shape.specification import preset, resolve

# One H200 SXM in a machine of eight, from datasheets; bytes per second are in one direction.
MEMORY, HBM = 141e9, 4.8e12
NVLINK, NETWORK, MACHINE = 450e9, 50e9, 8
HOP = 3e-6
"""Seconds that a ring takes for each GPU it passes, whatever the size: an assumption, not from a datasheet."""
SEQUENCE = 1024


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step on one GPU, and bytes it holds; all from arithmetic."""

    compute: float
    optimizer: float
    exposed: float
    """Seconds in which nothing computes because something is on its way."""
    slowest_link: str
    memory: float

    @property
    def seconds(self) -> float:
        return self.compute + self.optimizer + self.exposed

    @property
    def efficiency(self) -> float:
        """Tokens per second and GPU, as a share of one GPU's that waits for nobody and updates for free."""
        return self.compute / self.seconds


def step(shape: ModelShape, kind: str, gpus: int, tokens: int, micro: int, achieved: float) -> Step:
    """One step of `tokens` tokens on each GPU, in micro-batches of `micro` tokens, at `achieved` FLOP/s."""
    micro = min(micro, tokens)
    rounds = tokens / micro
    parameters = cost.parameters(shape)
    machines = max(1, gpus // MACHINE)
    shards = {"ddp": 1, "fsdp": gpus, "hsdp": min(MACHINE, gpus)}[kind]
    layers = range(shape.n_layers)
    kept = sum(layer_bytes_per_token(shape, i, SEQUENCE) for i in layers) * micro
    compute = tokens * cost.flops_per_token(shape, SEQUENCE) / achieved
    optimizer = (
        28 * parameters / shards / HBM
    )  # reads weight, gradient, two moments; writes all but the gradient
    sizes = [cost.layer_parameters(shape, i) for i in layers]
    times = [micro * cost.layer_flops_per_token(shape, i, SEQUENCE) / achieved / 3 for i in layers]
    tables = parameters - sum(sizes)
    # What leaves early is hidden by the backward pass of the layers below: twice their forward pass.
    behind = 2 * sum(times[:-1])
    if kind == "ddp":
        # A tied table and the first layer are done last, an untied head first; the rest leaves behind the layers' work.
        late = sizes[0] + (tables if shape.tied_embeddings else tables / 2)
        inside, between = uncovered(4 * late, 4 * (parameters - late), machines, behind)
        return Step(compute, optimizer, inside + between, bound(inside, between), 16 * parameters + kept)
    across = machines if kind == "fsdp" else 1
    gathers = [gather(2 * size, across) for size in sizes]
    scatters = [gather(4 * size, across) for size in sizes]
    # Tables and final norm are gathered in fp32 before the first block, and their gradients leave last.
    ends = 2 * gather(4 * tables, across)
    # Forward: the next block's parameters come while this one computes (a third of its time).
    waits = gathers[0] + sum(max(0.0, gathers[j] - times[i]) for i, j in pairwise(layers))
    # Backward: the one before comes, and the one behind leaves, over the same links, while this one computes.
    for i in layers:
        load = (gathers[i - 1] if i else 0.0) + (scatters[i + 1] if i + 1 < shape.n_layers else 0.0)
        waits += max(0.0, load - 2 * times[i])
    waits += scatters[0]
    inside = rounds * (waits + ends)
    between = 0.0
    if kind == "hsdp":
        between = uncovered(4 * (tables + sizes[0]), 4 * sum(sizes[1:]), machines, behind)[1]
    memory = 16 * parameters / shards + 4 * max(sizes) + 4 * tables + kept
    link = "network" if kind == "fsdp" and machines > 1 else bound(inside, between)
    return Step(compute, optimizer, inside + between, link, memory)


def gather(size: float, machines: int) -> float:
    """Seconds until every GPU of one machine or of `machines` has all of `size` bytes (or gave them away)."""
    inside = (MACHINE - 1) / MACHINE * size / NVLINK
    # A machine's eight network cards bring in what it lacks, once; NVLink hands it round at the same time.
    between = (machines - 1) / machines * size / (MACHINE * NETWORK)
    return max(inside, between) + HOP * (machines * MACHINE - 1)


def reduce_all(size: float, machines: int) -> tuple[float, float]:
    """Seconds inside machines and between them, to add up `size` bytes everywhere, one after the other."""
    inside = 2 * (MACHINE - 1) / MACHINE * size / NVLINK
    between = 2 * (machines - 1) / machines * size / MACHINE / NETWORK
    return inside, between


def uncovered(late: float, early: float, machines: int, behind: float) -> tuple[float, float]:
    """`reduce_all` of `late` bytes that nothing hides and of `early` ones, hidden by `behind` seconds of work."""
    exposed = [
        last + max(0.0, first - behind)
        for last, first in zip(reduce_all(late, machines), reduce_all(early, machines), strict=True)
    ]
    return exposed[0], exposed[1]


def bound(inside: float, between: float) -> str:
    return "network" if between > inside else "NVLink"


def models() -> dict[str, tuple[ModelShape, int]]:
    """Shapes, and the tokens of one optimizer step over all GPUs."""
    large = resolve({"profile": "crown", "layers": 40, "d_model": 5120, "head_dim": 128, "budget": "13B"})
    return {
        "crown-paper/crown-18": (preset("crown-paper/crown-18"), 393_216),
        "openelm/3b": (preset("openelm/3b"), 4_194_304),
        "crown, 40 layers, 13B": (large.shape, 4_194_304),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--achieved", type=float, default=350.0, help="TFLOP/s of one GPU in a step (350)")
    parser.add_argument("--micro", type=int, default=8192, help="tokens of a micro-batch at most (8192)")
    args = parser.parse_args()
    for name, (shape, batch) in models().items():
        print(
            f"\n{name}: {cost.parameters(shape) / 1e6:,.0f} M parameters, {batch:,} tokens a step or one sequence each\n"
        )
        print(
            "| GPUs | setting | tokens each | compute ms | optimizer ms | exposed ms | by | memory GB | efficiency |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for gpus in (8, 64, 1024):
            tokens = max(batch // gpus, SEQUENCE)  # a GPU has at least one sequence
            for kind in ("ddp", "fsdp", "hsdp") if gpus > MACHINE else ("ddp", "fsdp"):
                s = step(shape, kind, gpus, tokens, args.micro, args.achieved * 1e12)
                fits = f"{s.memory / 1e9:,.0f}" + ("" if s.memory < 0.9 * MEMORY else ", too much")
                print(
                    f"| {gpus} | `{kind}` | {tokens:,} | {1e3 * s.compute:,.1f} | {1e3 * s.optimizer:,.1f} "
                    f"| {1e3 * s.exposed:,.1f} | {s.slowest_link} | {fits} | {s.efficiency:.0%} |"
                )


if __name__ == "__main__":
    main()
