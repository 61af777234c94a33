"""Kills a training run at given points and lets it go on; run as a script by test_kill_and_resume.py.

    python killing.py FOLDER TRAIN VALIDATION POINTS SEED plain|staged|constructive|predicted

A point is a file operation inside the run's folder (open, rename, remove, mkdir, as Python's audit events
tell) or a step. The first run counts them; then POINTS of them, chosen at random, are each met by SIGKILL
in a fresh process forked from this one, which itself never trains. Prints one JSON object.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
import torch._dynamo  # the first optimizer imports it: better once than in every fork

from entasis.train import checkpoint
from entasis.train.metrics import records
from entasis.train.recipe import from_dict
from entasis.train.run import train

STAGED = {
    "tokens": None,
    "stages": [
        {"tokens": 128 * 4},
        {
            "tokens": 128 * 3,
            "transition": {
                "resize": {
                    "layers": [
                        {"n_heads": 4, "n_kv_heads": 2, "d_ff": 40},
                        {"n_heads": 1, "n_kv_heads": 1, "d_ff": 48},
                        {"n_heads": 1, "n_kv_heads": 1, "d_ff": 48},
                    ],
                    "sources": [0, 1, 1],
                }
            },
            "optimizer_state": "keep",
            "trainable": ["newest", "final_norm", "blocks[0].ffn"],
            "lr": 1e-3,
        },
        {
            "tokens": 128 * 3,
            "sequence": 16,
            "optimizer": {"weight_decay": 0.0},
            "transition": {"grow": {"operator": "append_random", "count": 1}},
            "warmup_new": 2,
        },
    ],
}

CONSTRUCTIVE = {
    "tokens": None,
    "stages": [
        {"tokens": 128 * 4},
        {
            "tokens": 128 * 3,
            "transition": {"grow": {"operator": "append_random", "count": 1}},
            "trainable": ["newest", "final_norm", "head"],
            "cache_frozen": True,
        },
        {"tokens": 128 * 3, "trainable": ["final_norm", "head"], "lora": {"rank": 2}},
    ],
}

PREDICTED = {
    "shape": {
        "d_model": 16, "head_dim": 8, "vocabulary": 257, "context": 32,
        "layers": [{"n_heads": 2, "n_kv_heads": 1, "d_ff": 32}] * 4,
    },
    "tokens": None,
    "stages": [
        {"tokens": 128 * 4},
        {
            "tokens": 128 * 3,
            "transition": {"grow": {"operator": "lesa", "after": "1", "epochs": 1, "hidden": 8}},
            "trainable": "newest",
        },
        {"tokens": 128 * 3, "transition": {"grow": {"operator": "half_step", "after": "2"}}, "warmup_new": 2},
    ],
}  # fmt: skip
KINDS: dict[str, dict] = {
    "plain": {},
    "staged": STAGED,
    "constructive": CONSTRUCTIVE,
    "predicted": PREDICTED,
}


def main(folder: Path, train_corpus: str, validation: str, points: int, seed: int, kind: str) -> None:
    if kind == "constructive":
        import peft  # noqa: F401  better once than in every fork
    if kind == "predicted":
        from entasis.grow import predictor  # noqa: F401  the same
    recipe = from_dict(
        {
            "shape": {
                "d_model": 16, "head_dim": 8, "vocabulary": 257, "context": 32,
                "layers": [
                    {"n_heads": 2, "n_kv_heads": 1, "d_ff": 32},
                    {"n_heads": 1, "n_kv_heads": 1, "d_ff": 48},
                ],
            },
            "data": {"train": train_corpus, "validation": validation, "sequence": 32},
            "batch": {"tokens": 128},
            "tokens": 128 * 10,
            "precision": "fp32", "compile": False, "attention": "plain", "device": "cpu",
            "evaluation": {"every": 4, "tokens": 2000},
            "checkpoint": {"every": 2, "keep_last": 2, "keep_every": 4},
            "logging": {"tensorboard": False},
            **KINDS[kind],
        }
    )  # fmt: skip
    whole = folder / "whole"
    total = in_fork(lambda: run(recipe, whole, None))
    expected = losses(whole)
    random.seed(seed)
    chosen = sorted(random.sample(range(1, total + 1), points))
    outcomes = []
    for point in chosen:
        place = folder / f"killed-{point}"
        died = in_fork(lambda place=place, point=point: run(recipe, place, point)) is None
        left = [path.name for path in place.glob("checkpoints/*")] if place.exists() else []
        in_fork(lambda place=place: run(recipe, place, None))
        same_weights = same_bytes(place / "model.safetensors", whole / "model.safetensors")
        outcomes.append(
            {"point": point, "died": died, "left": left, "same": losses(place) == expected and same_weights}
        )
    resumed = [checkpoint.step_of(path) for path in checkpoint.folders(whole)]
    print(json.dumps({"points": total, "outcomes": outcomes, "losses": expected, "checkpoints": resumed}))


def run(recipe, folder: Path, kill_at: int | None) -> int:
    seen = 0

    def point() -> None:
        nonlocal seen
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(folder) in str(
            args[0]
        ):
            point()

    sys.addaudithook(audit)
    train(recipe, folder, reporter=lambda event: point())
    return seen


def losses(folder: Path) -> list:
    return [
        [r["step"], r["loss"], r["gradient_norm"], r.get("validation_bits_per_byte")] for r in records(folder)
    ]


def same_bytes(a: Path, b: Path) -> bool:
    return a.read_bytes() == b.read_bytes()


def in_fork(work) -> int | None:
    """What `work` returns in a forked process; None when that process was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            os.write(writer, str(work()).encode())
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return None
    assert os.waitstatus_to_exitcode(status) == 0, "the run failed"
    return int(answer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(
        Path(sys.argv[1]),
        sys.argv[2],
        sys.argv[3],
        int(sys.argv[4]),
        int(sys.argv[5]),
        sys.argv[6],
    )
