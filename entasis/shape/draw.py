"""Columns in the terminal: every layer a row, heads to the left of the spine, FFN to the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from entasis.shape import cost
from entasis.shape.shapes import ModelShape

if TYPE_CHECKING:
    from rich.console import RenderableType

_EIGHTHS = " ▏▎▍▌▋▊▉█"


def columns(shapes: Sequence[tuple[str, ModelShape]], width: int) -> RenderableType:
    """The shapes side by side to one scale, the first layer at the bottom, for a terminal `width` columns wide."""
    from rich.columns import Columns

    most_heads = max(x.n_heads for _, s in shapes for x in s.layers)
    widest = max(x.d_ff for _, s in shapes for x in s.layers)
    room = max(28, min(60, width // len(shapes) - 2))
    bar = room - 14
    left, right = bar // 3, bar - bar // 3
    return Columns([_column(name, s, most_heads, widest, left, right) for name, s in shapes], padding=(1, 2))


def _column(
    name: str, shape: ModelShape, most_heads: int, widest: int, left: int, right: int
) -> RenderableType:
    from rich.text import Text

    text = Text(no_wrap=True, overflow="crop")
    text.append(f"{name}\n", style="bold")
    for i in reversed(range(shape.n_layers)):
        layer = shape.layers[i]
        heads = "█" * round(left * layer.n_heads / max(1, most_heads))
        text.append(f"{i:>3} ", style="dim")
        text.append(f"{layer.n_heads:>{3}} {heads:>{left}}", style="blue")
        text.append("│", style="dim")
        text.append(f"{_bar(layer.d_ff, widest, right):<{right}} {layer.d_ff}\n", style="yellow")
    text.append(f"    {'heads':>{left + 4}}│{'FFN'}", style="dim")
    return text


def _bar(value: int, most: int, width: int) -> str:
    eighths = round(8 * width * value / max(1, most))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def table(
    shapes: Sequence[tuple[str, ModelShape]], *, sequence: int, attended: cost.Attended
) -> RenderableType:
    """What each shape costs."""
    from rich.table import Table

    result = Table(box=None, pad_edge=False)
    result.add_column("shape", overflow="fold")
    for heading in (
        "layers",
        "d_model",
        "distinct",
        "parameters",
        "no input emb.",
        f"train FLOPs/token\n(T {sequence}, {attended})",
        "KV bytes/token\n(16 bit)",
        "weights+grads\n+AdamW",
    ):
        result.add_column(heading, justify="right")
    for name, shape in shapes:
        memory = cost.training_memory(shape)
        result.add_row(
            name,
            str(shape.n_layers),
            str(shape.d_model),
            str(shape.distinct_layers),
            f"{cost.parameters(shape):,}",
            f"{cost.parameters_without_input_embedding(shape):,}",
            f"{cost.flops_per_token(shape, sequence, attended=attended) / 1e6:,.2f} M",
            f"{cost.kv_bytes_per_token(shape):,}",
            f"{(memory.weights + memory.gradients + memory.optimizer) / 2**20:,.1f} MiB",
        )
    return result
