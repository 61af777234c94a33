"""Entasis: the loop behind `entasis train`."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from entasis.train.recipe import from_dict
from entasis.train.run import train


def main() -> None:
    settings = json.loads(sys.argv[1])
    layer = {"n_heads": settings["heads"], "n_kv_heads": settings["heads"], "d_ff": settings["d_ff"]}
    tokens = settings["batch"] * settings["sequence"]
    recipe = from_dict(
        {
            "shape": {
                "d_model": settings["d_model"],
                "head_dim": settings["d_model"] // settings["heads"],
                "vocabulary": settings["vocabulary"],
                "context": settings["sequence"],
                "tied_embeddings": True,
                "layers": [layer] * settings["layers"],
            },
            "data": {"train": f"{settings['corpus']}/train", "sequence": settings["sequence"]},
            "batch": {"tokens": tokens},
            "tokens": tokens * settings["steps"],
            "precision": settings["precision"],
            "compile": settings["compile"],
            # Named, as these steps are too few for `auto` to time its candidates.
            "attention": "plain",
            "checkpoint": {"every": None},
            "logging": {"tensorboard": False},
        }
    )
    seconds: list[float] = []
    cpu: list[float] = []
    about: dict[str, Any] = {}

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "start":
            about.update({key: event[key] for key in ("parameters", "precision", "compile", "attention")})
        elif event["event"] == "step":
            seconds.append(event["seconds"])
            cpu.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        train(recipe, Path(folder) / "run", reporter=listen)
    about["versions"] = {"torch": torch.__version__}
    about["optimizer"] = recipe.optimizer.name + ", fused"
    print(json.dumps({"seconds": seconds, "cpu": cpu, **about}))


if __name__ == "__main__":
    main()
