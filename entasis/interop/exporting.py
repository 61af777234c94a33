"""Out to the tools that serve: one registered function for each format.

    entasis export runs/tiny --to hf --output exported/tiny

A format takes a `Source` and writes into a folder that is renamed into place when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from entasis.errors import UserError
from entasis.interop import model_card
from entasis.interop.aside import new_folder
from entasis.interop.equivalent import Drawing, folded
from entasis.model import weights
from entasis.shape import cost, fields

Writer = Callable[["Source", Path], dict[str, Any]]
FORMATS: dict[str, Writer] = {}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """What is exported: where it lies, its drawing with all scales folded, and the dtype asked for."""

    folder: Path
    drawing: Drawing
    dtype: str

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.json"


def register(name: str) -> Callable[[Writer], Writer]:
    """Makes a format known by `name`."""

    def add(write: Writer) -> Writer:
        FORMATS[name] = write
        return write

    return add


def export(source: str | Path, output: str | Path, *, to: str, dtype: str = "f32") -> dict[str, Any]:
    """Writes the model in `source` (a finished run or an imported model) to the new folder `output`.

    Returns what was written: `parameters` counts the numbers in the folder, `model_parameters` those of the model, which
    are fewer where zeros were added.

    `dtype` is f32, f16 or bf16, for GGUF also q8_0. Raises `UserError` when `output` exists, or when the format
    cannot hold the model: the message says why and which format can.
    """
    from entasis.interop import gguf_export, hf_export  # noqa: F401  they register themselves

    source, output = Path(source), Path(output)
    if to not in FORMATS:
        raise UserError(f"--to {to!r} is not known; choose one of {', '.join(FORMATS)}")
    if dtype not in DTYPES and not (to == "gguf" and dtype == "q8_0"):
        raise UserError(f"--dtype {dtype!r} is not known for {to}; choose f32, f16 or bf16 (gguf: q8_0 too)")
    if output.exists():
        raise UserError(f"{output} exists; name another folder")
    fields.require(weights.read_shape(source).layers, f"export --to {to}")
    model = weights.load(source, dtype=torch.float32)
    drawing = folded(Drawing(model.shape, {n: p.detach() for n, p in model.named_parameters()}))
    chosen = Source(source, drawing, dtype)
    own = cost.parameters(model.shape)
    need = None if to == "padded" else own * DTYPES.get(dtype, torch.int8).itemsize
    with new_folder(output, need) as aside:
        written = FORMATS[to](chosen, aside)
        answer = {"format": to, "dtype": dtype, "model_parameters": own, **written}
        (aside / "README.md").write_text(model_card.write(source, model.shape, answer), encoding="utf-8")
        (aside / "entasis.json").write_text(
            json.dumps({"shape": model.shape.to_dict(), **answer}, indent=1) + "\n", encoding="utf-8"
        )
    return {"output": str(output), **answer}
