"""What a measure is given: the model, the text, a seed, and a folder for partial results."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from entasis.anatomy.text import Text, TextBatch
from entasis.files import write_bytes
from entasis.model.initialisation import init_weights
from entasis.model.rotary import Rotation
from entasis.model.transformer import Transformer
from entasis.shape.shapes import ModelShape

TOKENS_AT_ONCE = 2048
Progress = Callable[[int, int], object]
"""Called with the work done and all the work."""


@dataclass
class Subject:
    """A model, the text it reads, and how it is measured.

    `only` are the layers that ablations, manipulations and recovery are done on, None all. `precision` is that of the
    matrix products that the text goes through, fp32 or bf16. `folder` is where partial results are kept, None keeps none.
    `most_batches` bounds the text.
    """

    model: Transformer
    text: Text
    seed: int = 0
    only: frozenset[int] | None = None
    precision: str = "fp32"
    folder: Path | None = None
    progress: Progress = lambda done, total: None
    most_batches: int | None = None

    @property
    def shape(self) -> ModelShape:
        return self.model.shape

    @property
    def n_layers(self) -> int:
        return self.model.shape.n_layers

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def chosen(self) -> list[int]:
        return sorted(range(self.n_layers) if self.only is None else self.only)

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def batches(self) -> Iterator[TextBatch]:
        """The text in windows; reports progress after each batch."""
        spans = self.text.spans(max(1, TOKENS_AT_ONCE // self.text.sequence))[: self.most_batches]
        for number, span in enumerate(spans):
            self.progress(number, len(spans))
            yield self.text.batch(number, span, self.device)
        self.progress(len(spans), len(spans))

    def rotation(self, batch: TextBatch) -> Rotation | None:
        """What the layers turn queries and keys of a batch by."""
        return self.model.rotation(0, batch.tokens_BT.shape[1], self.device)

    def generator(self, *purpose: object) -> torch.Generator:
        """Random numbers that depend on the seed and their purpose, and on nothing else."""
        digest = hashlib.blake2b(repr((self.seed, *purpose)).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def untrained(self) -> Subject:
        """A model of the same shape at its initial values, on the first batch of the text: the control."""
        with torch.device(self.device):
            model = Transformer(self.shape)
        # A seed that nobody trains with: the control must not share the model's own initial values.
        init_weights(model, self.seed + 0x1234567, tables_of=self.model)
        return replace(self, model=model.eval(), most_batches=1, progress=lambda done, total: None)

    def remember(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """`compute()`, or its result that the folder holds under this name."""
        if self.folder is None:
            return compute()
        path = self.folder / "partial" / f"{name}.npy"
        if path.is_file():
            return np.load(path, allow_pickle=False)
        result, buffer = compute(), io.BytesIO()
        np.save(buffer, result, allow_pickle=False)
        write_bytes(path, buffer.getvalue())
        return result
