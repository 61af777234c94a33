"""A training step of a shape, as the loop makes it, for benchmarks that alternate between shapes in one process."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.shape.shapes import ModelShape
from entasis.train import optimizers
from entasis.train.allocation import keep_freed_memory
from entasis.train.compilation import compiled
from entasis.train.recipe import Optimizer


class Stepper:
    """Forward, backward, clipping and AdamW on random tokens [batch, sequence]; each step waits for its end.

    With `documents` attention stays inside documents of so many tokens on average. After a step, `loss` and `norm` are
    its loss and the norm of its gradient.
    """

    def __init__(
        self,
        shape: ModelShape,
        batch: int,
        sequence: int,
        *,
        compile: bool = False,
        bf16: bool = False,
        attention: str = "sdpa",
        documents: int = 0,
        device: str = "cpu",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if device == "cpu":
            keep_freed_memory()
        self.clock = clock
        self.device, self.bf16, self.tokens = device, bf16, batch * sequence
        self.model = Transformer(shape, attention=attention).to(device)  # type: ignore[arg-type]
        init_weights(self.model, 0)
        names = [name for name, _ in self.model.named_parameters()]
        self.optimizers = optimizers.build(self.model, Optimizer(), names)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(shape.vocabulary, (batch, sequence + 1), generator=generator).to(device)
        self.tokens_BT, self.targets_BT = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        starts = torch.rand(batch, sequence, generator=generator) < 1 / max(1, documents)
        self.ids_BT = starts.cumsum(1).to(device) if documents else None
        self.loss_of: Callable[..., torch.Tensor] = compiled(self.model) if compile else self.model.loss

    def step(self) -> float:
        """Seconds of one step."""
        begun = self.clock()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss = self.loss_of(self.tokens_BT, self.targets_BT, document_ids_BT=self.ids_BT) / self.tokens
        loss.backward()
        self.norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        self.loss = loss.item()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self.clock() - begun
