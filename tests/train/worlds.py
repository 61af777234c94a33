"""Trains the same recipe on several processes, some of them killed on the way; run by test_sharding.py.

    python worlds.py FOLDER TRAIN VALIDATION

Every rank is forked from this process, which imports torch once and itself never trains. Prints one JSON object:
what each run measured.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # the first optimizer imports it: better once than in every fork
from safetensors.torch import load_file

from entasis.train.metrics import records
from entasis.train.recipe import from_dict
from entasis.train.run import train

LAYERS = [
    {"n_heads": 2, "n_kv_heads": 1, "d_ff": 48},
    {"n_heads": 4, "n_kv_heads": 2, "d_ff": 90},
    {"n_heads": 0, "n_kv_heads": 0, "d_ff": 40},
]
FSDP, HSDP = {"kind": "fsdp"}, {"kind": "hsdp", "shard": 2}
MUON = {"lr": 1e-2, "eps": 1e-5, "name": "muon", "weight_decay": 0.1}
STAGES = [
    {"trainable": ["blocks.1.*", "norm.*"], "tokens": 512 * 4},
    {"tokens": 512 * 4, "optimizer_state": "keep"},
]


def main(folder: Path, train_corpus: str, validation: str) -> None:
    def recipe(**changes):
        source = {
            "shape": {"d_model": 32, "head_dim": 8, "vocabulary": 257, "context": 64, "layers": LAYERS},
            "data": {"train": train_corpus, "validation": validation, "sequence": 64},
            "batch": {"tokens": 512, "micro": 1},
            "tokens": 512 * 8,
            # Adam's first steps divide a gradient by its own size: one that is zero but for rounding moves its
            # weight by up to lr either way. A larger eps leaves only the differences that matter.
            "optimizer": {"lr": 1e-2, "eps": 1e-5},
            "precision": "fp32", "compile": False, "attention": "plain", "device": "cpu",
            "evaluation": {"tokens": 2000},
            "checkpoint": {"every": 3, "keep_every": 3},
            "logging": {"tensorboard": False},
        }  # fmt: skip
        return from_dict({**source, **changes})

    plans = {
        "one": [(1, {}, None)],
        "ddp on 4, then on 1": [(4, {}, 5), (1, {}, None)],
        "one, then hsdp on 4": [(1, {}, 5), (4, HSDP, None)],
        "fsdp on 4, then on 2": [(4, FSDP, 5), (2, FSDP, None)],
        "fsdp on 2, then one": [(2, FSDP, 5), (1, FSDP, None)],
    }
    told = {}
    for name, steps in plans.items():
        place = folder / name.replace(" ", "-")
        # Those that will be killed compute two of the three layers twice; they need not when they go on.
        for world, how, kill_at in steps:
            on_ranks(
                world, recipe(parallel=how, activation_memory="300kB" if kill_at else None), place, kill_at
            )
        told[name] = outcome(place)
    for name, changes in (("muon", {"optimizer": MUON}), ("stages", {"stages": STAGES})):
        for world, kind in ((1, "ddp"), (2, "fsdp"), (2, "ddp")):
            place = folder / f"{name}-{kind}-{world}"
            on_ranks(world, recipe(parallel={"kind": kind}, **changes), place, None)
            told[f"{name}, {kind} on {world}"] = outcome(place)
    told["weights"] = {
        name: max_difference(folder / "one", folder / name.replace(" ", "-")) for name in plans
    }
    print(json.dumps(told))


def outcome(place: Path) -> dict:
    result = json.loads((place / "result.json").read_text())
    return {
        "steps": [r["step"] for r in records(place)],
        "losses": [r["loss"] for r in records(place)],
        "norms": [r["gradient_norm"] for r in records(place)],
        "bits_per_byte": result["validation"]["bits_per_byte"],
        "kept": sorted(p.parent.name for p in place.glob("checkpoints/*/model.safetensors")),
    }


def max_difference(a: Path, b: Path) -> float:
    """Of all weights, each between 1e-3 and 1 in size."""
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def on_ranks(world: int, recipe, place: Path, kill_at: int | None) -> None:
    """Runs `world` processes to their end, or kills them all once rank 0 has finished step `kill_at`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
            os._exit(one_rank(recipe, place, kill_at))
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])]
    for child in children[1:]:
        if kill_at is not None:
            os.kill(child, signal.SIGKILL)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    if kill_at is None:
        assert codes == [0] * world, codes
    else:
        # The others were killed, or had seen that rank 0 was gone.
        assert codes[0] == -signal.SIGKILL and 0 not in codes, codes


def one_rank(recipe, place: Path, kill_at: int | None) -> int:
    def report(event: dict) -> None:
        if event["event"] == "step" and event["step"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        train(recipe, place, reporter=report)
        return 0
    except BaseException:
        if kill_at is None:
            traceback.print_exc()
        return 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    begun = time.time()
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
    print(f"{time.time() - begun:.0f} s", file=sys.stderr)
