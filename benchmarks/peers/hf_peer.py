"""Hugging Face: LlamaForCausalLM under transformers' Trainer."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy
import torch
import transformers


class Windows(torch.utils.data.Dataset):
    """Consecutive sequences of the corpus; the model shifts the labels itself."""

    def __init__(self, tokens: numpy.ndarray, sequence: int) -> None:
        self.tokens, self.sequence = tokens, sequence

    def __len__(self) -> int:
        return len(self.tokens) // self.sequence

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = torch.from_numpy(self.tokens[i * self.sequence : (i + 1) * self.sequence].astype(numpy.int64))
        return {"input_ids": row, "labels": row}


class Clock(transformers.TrainerCallback):
    """Seconds from the end of one step to the end of the next: reading the batch included."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.cpu: list[float] = []

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, *_: object, **__: object) -> None:
        self.times.append(time.perf_counter())
        self.cpu.append(time.process_time())


def main() -> None:
    settings = json.loads(sys.argv[1])
    config = transformers.LlamaConfig(
        vocab_size=settings["vocabulary"],
        hidden_size=settings["d_model"],
        intermediate_size=settings["d_ff"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        max_position_embeddings=settings["sequence"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=settings["batch"],
            max_steps=settings["steps"],
            learning_rate=6e-4,
            weight_decay=0.1,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=settings["precision"] == "bf16",
            torch_compile=settings["compile"],
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        tokens = numpy.load(Path(settings["corpus"]).parent / "tokens.npy", mmap_mode="r")
        data = Windows(tokens, settings["sequence"])
        transformers.Trainer(model, arguments, train_dataset=data, callbacks=[clock]).train()
    print(
        json.dumps(
            {
                "seconds": [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)],
                "cpu": clock.cpu,
                "parameters": sum(p.numel() for p in model.parameters()),
                "precision": settings["precision"],
                "compile": settings["compile"],
                "attention": model.config._attn_implementation,
                "optimizer": "adamw, fused",
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
