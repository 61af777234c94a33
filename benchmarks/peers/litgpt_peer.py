"""litgpt: `litgpt pretrain`, its setup() called with a configuration. It always compiles.

The tokens per second it prints are wrong (tokens over a clock reading, not over a difference of two), so its
iterations are timed from batch to batch.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from litgpt import Config, pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule


class Rows(torch.utils.data.Dataset):
    """Consecutive sequences of the corpus; notes when the first row of each batch is asked for."""

    def __init__(self, tokens: numpy.ndarray, width: int, batch_size: int) -> None:
        self.tokens, self.width, self.batch_size = tokens, width, batch_size
        self.asked: list[float] = []
        self.cpu: list[float] = []

    def __len__(self) -> int:
        return len(self.tokens) // self.width

    def __getitem__(self, i: int) -> torch.Tensor:
        if i % self.batch_size == 0:
            self.asked.append(time.perf_counter())
            self.cpu.append(time.process_time())
        return torch.from_numpy(self.tokens[i * self.width : (i + 1) * self.width].astype(numpy.int64))


class Windows(DataModule):
    """What litgpt asks of its data."""

    def __init__(self, tokens: numpy.ndarray) -> None:
        super().__init__()
        self.tokens = tokens

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int = 0) -> None:
        self.batch_size = batch_size
        self.rows = Rows(self.tokens, max_seq_length + 1, batch_size)

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(self.rows, batch_size=self.batch_size)

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        held_out = Rows(self.tokens[:10_000], self.rows.width, self.batch_size)
        return torch.utils.data.DataLoader(held_out, batch_size=self.batch_size)


def main() -> None:
    settings = json.loads(sys.argv[1])
    config = Config(
        name="benchmark",
        block_size=settings["sequence"],
        n_layer=settings["layers"],
        n_embd=settings["d_model"],
        n_head=settings["heads"],
        vocab_size=settings["vocabulary"],
        padded_vocab_size=settings["vocabulary"],
        intermediate_size=settings["d_ff"],
        mlp_class_name="LLaMAMLP",
        norm_class_name="RMSNorm",
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
    )
    data = Windows(numpy.load(Path(settings["corpus"]).parent / "tokens.npy", mmap_mode="r"))
    tokens = settings["batch"] * settings["sequence"]
    with tempfile.TemporaryDirectory() as folder:
        pretrain.setup(
            "benchmark",
            model_config=config,
            out_dir=Path(folder),
            precision={"fp32": "32-true", "bf16": "bf16-mixed"}[settings["precision"]],
            data=data,
            train=TrainArgs(
                global_batch_size=settings["batch"],
                micro_batch_size=settings["batch"],
                max_tokens=tokens * (settings["steps"] + 1),
                max_norm=1.0,
                tie_embeddings=True,
                lr_warmup_steps=2,
                save_interval=None,
                log_interval=1,
            ),
            eval=EvalArgs(interval=10**9, max_iters=1, final_validation=False),
            devices=1,
            logger_name="csv",
        )
    print()
    parameters = (
        2 * settings["d_model"] * (settings["d_model"] * 2) + 3 * settings["d_model"] * settings["d_ff"]
    )
    parameters = settings["layers"] * (parameters + 2 * settings["d_model"])
    parameters += settings["d_model"] * (settings["vocabulary"] + 1)
    print(
        json.dumps(
            {
                "seconds": [b - a for a, b in zip(data.rows.asked, data.rows.asked[1:], strict=False)],
                "cpu": data.rows.cpu[1:],
                "parameters": parameters,
                "precision": settings["precision"],
                "compile": True,
                "attention": "sdpa",
                "optimizer": "adamw, fused on CUDA only",
                "versions": {"torch": torch.__version__, "litgpt": version("litgpt")},
            }
        )
    )


if __name__ == "__main__":
    main()
