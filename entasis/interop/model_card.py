"""The README.md of an exported model: what it is, how it was made, how to open it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from entasis.files import SEAL, read_json
from entasis.grow.provenance import Lineage, read
from entasis.shape import cost
from entasis.shape.shapes import ModelShape


def write(source: Path, shape: ModelShape, answer: dict[str, Any]) -> str:
    """The card's text, from the source folder's own records where it has any."""
    lines = [
        f"# {source.resolve().name}",
        "",
        f"A decoder-only language model of {cost.parameters(shape):,} parameters in {shape.n_layers} layers, "
        f"{shape.distinct_layers} of them distinct, exported by Entasis as `{answer['format']}` ({answer['dtype']})"
        + _zeros(answer),
        "",
        *_how_to_open(answer, (source / "tokenizer.json").is_file()),
        "",
        "## Layers",
        "",
        "| layer | heads | KV heads | FFN | | from |",
        "|---|---|---|---|---|---|",
    ]
    lineage = read(source, shape.n_layers)
    most = max(cost.layer_parameters(shape, i) for i in range(shape.n_layers))
    for i in reversed(range(shape.n_layers)):
        layer = shape.layers[i]
        bar = "█" * max(1, round(24 * cost.layer_parameters(shape, i) / most))
        lines.append(
            f"| {i} | {layer.n_heads} | {layer.n_kv_heads} | {layer.d_ff} | {bar} | {_from(lineage, i)} |"
        )
    lines += _study(source)
    for name, heading in (("result.json", "Training"), ("provenance.json", "Origin")):
        path = source / name
        if path.is_file():
            record = read_json(path)
            hidden = {SEAL, "files", "busy", "layers", "diagnostics", "transitions"}
            if record.get("busy") or record.get("mfu", 0) > 1:
                hidden.add("mfu")  # its ceiling was measured while other work took the processor
            lines += ["", f"## {heading}", "", "| | |", "|---|---|"]
            lines += [f"| {key} | {_plain(value)} |" for key, value in record.items() if key not in hidden]
    return "\n".join(lines) + "\n"


def _from(lineage: Lineage, index: int) -> str:
    """What the last transition made a layer of, or which operators made it before that."""
    origin, earlier = lineage.origins[index], [made.operator for made in lineage.histories[index]]
    new = " (new)" if index in lineage.newest else ""
    if origin.operator is None:
        moved = "" if origin.sources == (index,) else f"{origin.sources[0]}"
        return ", ".join(filter(None, [moved, f"earlier: {' + '.join(earlier)}" if earlier else ""])) + new
    sources = f" of {' and '.join(map(str, origin.sources))}" if origin.sources else ""
    return f"{origin.operator}{sources}{new}"


def _study(source: Path) -> list[str]:
    """The study that the run is part of (STUDY/runs/ARM/seed-0)."""
    run = source.resolve()
    if len(run.parents) < 3:
        return []
    verdict = run.parents[2] / "verdict.json"
    if run.parents[1].name != "runs" or not verdict.is_file():
        return []
    told = read_json(verdict)
    return [
        "",
        "## Study",
        "",
        f"Arm `{run.parent.name}`, {run.name}, of “{told['title']}”. {told['sentence']}",
    ]


def _zeros(answer: dict[str, Any]) -> str:
    more = answer["parameters"] - answer["model_parameters"]
    return f"; {more:,} zeros were added, which makes {answer['parameters']:,} here." if more else "."


def _how_to_open(answer: dict[str, Any], tokenizer: bool) -> list[str]:
    if answer["format"] == "gguf":
        return ["```", f'llama-cli -m {answer["file"]} -p "…"', "```"]
    # AutoTokenizer would ask whether to run the folder's code, which only the model needs.
    opener = "PreTrainedTokenizerFast" if answer["remote_code"] else "AutoTokenizer"
    trust = ", trust_remote_code=True" if answer["remote_code"] else ""
    lines = [f"from transformers import AutoModelForCausalLM{f', {opener}' if tokenizer else ''}", ""]
    lines.append(f'model = AutoModelForCausalLM.from_pretrained("."{trust})')
    if tokenizer:
        lines.append(f'tokenizer = {opener}.from_pretrained(".")')
    return ["```python", *lines, "```"]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return f"{value:.5g}" if isinstance(value, float) else str(value)
