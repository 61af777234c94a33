"""Tokens per second of greedy generation, ours against transformers', the same weights in the same process.

    make smollm2 && .venv/bin/python benchmarks/generate.py

SmolLM2-135M (fp32, from its GGUF) continues one prompt and a batch of eight, alternating; medians. transformers
reads the folder that `entasis export --to hf` writes. The continuations must be equal.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import write
from transformers import AutoModelForCausalLM

import entasis
from entasis.evaluate.generation import Sampling, generate
from entasis.evaluate.loading import Loaded
from entasis.interop.exporting import export
from entasis.interop.importing import import_model

SOURCE = Path(__file__).parents[1] / ".cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The old lighthouse keeper climbed the stairs slowly, one hand on the rail, listening to the wind"
TOKENS, ROUNDS = 48, 5


def main() -> None:
    """Writes and prints benchmarks/results/generate-TIME.json."""
    with tempfile.TemporaryDirectory() as folder:
        import_model(SOURCE, Path(folder) / "ours")
        export(Path(folder) / "ours", Path(folder) / "theirs", to="hf")
        ours = entasis.load(Path(folder) / "ours")
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "theirs", dtype=torch.float32).eval()
        prompt = ours.encode(PROMPT)
        figures = {}
        for batch in (1, 8):
            assert run_ours(ours, prompt, batch)[0] == run_theirs(theirs, prompt, batch)[0]
            speeds: dict[str, list[float]] = {"entasis": [], "transformers": []}
            for _ in range(ROUNDS):
                speeds["entasis"].append(run_ours(ours, prompt, batch)[1])
                speeds["transformers"].append(run_theirs(theirs, prompt, batch)[1])
            medians = {name: statistics.median(values) for name, values in speeds.items()}
            figures[f"batch_{batch}"] = {
                "tokens_per_second": medians,
                "ratio": medians["entasis"] / medians["transformers"],
                "rounds": speeds,
            }
    write(
        "generate",
        ["torch", "transformers"],
        model="SmolLM2-135M-Instruct, fp32",
        threads=torch.get_num_threads(),
        new_tokens=TOKENS,
        **figures,
    )


def run_ours(loaded: Loaded, prompt: list[int], batch: int) -> tuple[list[int], float]:
    """The first continuation and new tokens per second, reading the prompt included."""
    begun = time.perf_counter()
    steps = list(generate(loaded.model, [prompt] * batch, tokens=TOKENS, sampling=Sampling(0)))
    seconds = time.perf_counter() - begun
    return [step[0] for step in steps if step[0] is not None], batch * TOKENS / seconds


def run_theirs(model: torch.nn.Module, prompt: list[int], batch: int) -> tuple[list[int], float]:
    ids = torch.tensor([prompt] * batch)
    begun = time.perf_counter()
    with torch.inference_mode():
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            pad_token_id=0,
        )
    seconds = time.perf_counter() - begun
    return answer[0, len(prompt) :].tolist(), batch * TOKENS / seconds


if __name__ == "__main__":
    main()
