"""A model's layers as a drawn column: the SVG that pages show and papers print.

Bottom layer at the bottom. Each layer is a bar as wide as its parameters allow, in two colours: attention
inside, FFN outside, so that the outline is the column's silhouette.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from entasis.shape import cost
from entasis.shape.shapes import ModelShape

_WIDTH, _BAR, _GAP, _MARGIN = 120.0, 10.0, 2.0, 4.0
_COLOURS = {"attention": "#2f6f9f", "ffn": "#d08a3e"}
KEY = '<p class="key"><i class="attention"></i>attention<i class="ffn"></i>FFN (area: parameters of each layer)</p>'


def widest(shapes: Sequence[ModelShape]) -> int:
    """Parameters of the largest layer of all, which fills the drawing's width."""
    return max(cost.layer_parameters(s, i) for s in shapes for i in range(s.n_layers))


def silhouette(shape: ModelShape, *, scale: int | None = None) -> str:
    """SVG of one column; `scale` (see `widest`) draws several to one measure.

    Bars have classes `attention` and `ffn` and colours of their own where no style sheet gives any.
    """
    scale = scale or widest([shape])
    height = shape.n_layers * (_BAR + _GAP) + 2 * _MARGIN
    bars = []
    for i, layer in enumerate(shape.layers):
        total = cost.layer_parameters(shape, i)
        attention = _attention_parameters(shape, i)
        y = height - _MARGIN - (i + 1) * (_BAR + _GAP) + _GAP
        tip = f"layer {i}: {layer.n_heads} heads, {layer.n_kv_heads} KV heads, FFN {layer.d_ff}, {total:,} parameters"
        bars.append(f"<g><title>{html.escape(tip)}</title>{_bar('ffn', total, scale, y)}")
        bars.append(f"{_bar('attention', attention, scale, y)}</g>")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {height:g}" role="img" '
        f'aria-label="{shape.n_layers} layers">{"".join(bars)}</svg>'
    )


def figure(shapes: Sequence[tuple[str, ModelShape]]) -> str:
    """SVG of several columns side by side with their names, numbers and a legend: for a paper."""
    scale = widest([shape for _, shape in shapes])
    tallest = max(shape.n_layers for _, shape in shapes) * (_BAR + _GAP) + 2 * _MARGIN
    parts = []
    for k, (name, shape) in enumerate(shapes):
        height = shape.n_layers * (_BAR + _GAP) + 2 * _MARGIN
        inner = silhouette(shape, scale=scale).replace(
            "<svg ",
            f'<svg x="{k * _WIDTH:g}" y="{tallest - height:g}" width="{_WIDTH:g}" height="{height:g}" ',
            1,
        )
        lines = [(name, 10.0), *((line, 7.0) for line in _numbers(shape))]
        labels = [
            _text((k + 0.5) * _WIDTH, tallest + 13 + 10 * i, line, size)
            for i, (line, size) in enumerate(lines)
        ]
        parts.append(inner + "".join(labels))
    width, height = len(shapes) * _WIDTH, tallest + 62
    for i, kind in enumerate(_COLOURS):
        x = width / 2 - 45 + 50 * i
        parts.append(
            f'<rect fill="{_COLOURS[kind]}" x="{x:g}" y="{height - 10:g}" width="7" height="7" rx="1.2"/>'
        )
        parts.append(
            _text(x + 10, height - 4, {"attention": "attention", "ffn": "FFN"}[kind], 7.0, anchor="start")
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}">{"".join(parts)}</svg>\n'
    )


def _numbers(shape: ModelShape) -> list[str]:
    """What stands under a column: its parameters, its size, and what its layers span."""

    def span(values: Sequence[int]) -> str:
        return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,}–{max(values):,}"

    return [
        f"{cost.parameters(shape):,} parameters",
        f"{shape.n_layers} layers, d_model {shape.d_model:,}",
        f"FFN {span([x.d_ff for x in shape.layers])}, heads {span([x.n_heads for x in shape.layers])}",
    ]


def _text(x: float, y: float, text: str, size: float, anchor: str = "middle") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-family="sans-serif" font-size="{size:g}" '
        f'fill="#555555">{html.escape(text)}</text>'
    )


def _bar(kind: str, parameters: int, scale: int, y: float) -> str:
    width = (_WIDTH - 2 * _MARGIN) * parameters / scale
    return (
        f'<rect class="{kind}" fill="{_COLOURS[kind]}" x="{(_WIDTH - width) / 2:.2f}" y="{y:.2f}" '
        f'width="{width:.2f}" height="{_BAR:g}" rx="1.2"/>'
    )


def _attention_parameters(shape: ModelShape, index: int) -> int:
    """Of the four projections; norms are too thin to see."""
    layer = shape.layers[index]
    return 2 * shape.d_model * shape.head_dim * (layer.n_heads + layer.n_kv_heads)
