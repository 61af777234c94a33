"""nanoGPT: train.py of a checkout, with its own GELU, LayerNorm and learned positions.

Its FFN is 4 d wide with two matrices, which has the parameters and FLOPs of SwiGLU with 8/3 d. The times are those
that train.py prints with log_interval=1: from the end of one iteration to the end of the next.
"""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import torch


def main() -> None:
    settings = json.loads(sys.argv[1])
    checkout = Path(settings["nanogpt"]).expanduser().resolve()
    tokens = numpy.load(Path(settings["corpus"]).parent / "tokens.npy", mmap_mode="r").astype(numpy.uint16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for script in ("train.py", "model.py", "configurator.py"):
            (folder / script).symlink_to(checkout / script)
        data = folder / "data/benchmark"
        data.mkdir(parents=True)
        tokens.tofile(data / "train.bin")
        tokens[:100_000].tofile(data / "val.bin")
        # train.py learns the vocabulary's size from this file.
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": settings["vocabulary"]}))
        options = {
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[settings["precision"]],
            "compile": settings["compile"],
            "dataset": "benchmark",
            "out_dir": str(folder / "out"),
            "n_layer": settings["layers"],
            "n_head": settings["heads"],
            "n_embd": settings["d_model"],
            "block_size": settings["sequence"],
            "batch_size": settings["batch"],
            "gradient_accumulation_steps": 1,
            "max_iters": settings["steps"],
            "eval_interval": 10**9,
            "eval_iters": 1,
            "log_interval": 1,
            "bias": False,
        }
        command = [sys.executable, "train.py", *(f"--{key}={value}" for key, value in options.items())]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
    seconds = [
        float(ms) / 1e3 for ms in re.findall(r"^iter \d+: loss [^,]+, time ([\d.]+)ms", done.stdout, re.M)
    ]
    parameters = re.search(r"number of parameters: ([\d.]+)M", done.stdout)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu": None,
                "parameters": round(float(parameters[1]) * 1e6) if parameters else None,
                "precision": settings["precision"],
                "compile": settings["compile"],
                "attention": "sdpa",
                "optimizer": "adamw, fused on CUDA only",
                "versions": {"torch": torch.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
