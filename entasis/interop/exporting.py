"""Out to the tools that serve: one registered function for each format.

    entasis export runs/tiny --to hf --output exported/tiny

A format takes an `ExportRequest` and writes into a folder that is renamed into place when it is complete.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from entasis.errors import UserError
from entasis.files import new_folder
from entasis.grow import provenance
from entasis.interop import model_card
from entasis.interop.hf_tokenizer import Ends, read_ends
from entasis.interop.transforms import ShapedWeights, fold_scales
from entasis.model import weights
from entasis.model.transformer import Transformer
from entasis.registry import Registry
from entasis.shape import cost, fields
from entasis.shape.interfaces import CODES, FULL, LEARNED

Writer = Callable[["ExportRequest", Path], dict[str, Any]]
FORMATS: Registry[Writer] = Registry("--to")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ExportRequest:
    """What is exported: the folder it lies in, its weights with all scales folded, and the dtype asked for."""

    folder: Path
    weights: ShapedWeights
    dtype: str

    @property
    def home(self) -> Path:
        """Where its tokenizer lies."""
        return weights.home_of(self.folder)

    @property
    def tokenizer(self) -> Path:
        return self.home / weights.TOKENIZER

    @functools.cached_property
    def ends(self) -> Ends:
        return read_ends(self.home)


@torch.no_grad()
def _with_table(model: Transformer) -> ShapedWeights:
    """The weights with a frozen interface's vectors as an ordinary table, which every format has."""
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    if model.shape.interface == LEARNED:
        return ShapedWeights(model.shape, tensors)
    tensors.pop(CODES, None)
    # Without positions, which the formats hold apart.
    tensors[FULL] = model.embedding.tokens(torch.arange(model.shape.vocabulary)).to(torch.float32)
    return ShapedWeights(replace(model.shape, interface=LEARNED), tensors)


def _check_range(request: ExportRequest) -> None:
    """Raises `UserError` for weights that the dtype has no numbers for. What q8_0 cannot hold in blocks becomes f16."""
    most = torch.finfo(DTYPES.get(request.dtype, torch.float16)).max
    for name, tensor in request.weights.tensors.items():
        if tensor.numel() and max(abs(end) for end in tensor.aminmax()) > most:
            raise UserError(f"{name} has numbers too large for {request.dtype}; choose another --dtype")


def export(source: str | Path, output: str | Path, *, to: str, dtype: str = "f32") -> dict[str, Any]:
    """Writes the model in `source` (a finished run or an imported model) to the new folder `output`.

    Returns what was written: `parameters` counts the numbers in the folder, `model_parameters` those of the model, which
    are fewer where zeros were added.

    `dtype` is f32, f16 or bf16, for GGUF also q8_0. Raises `UserError` when `output` exists, or when the format
    cannot hold the model: the message says why and which format can.
    """
    from entasis.interop import gguf_export, hf_export  # noqa: F401  (register the formats)

    source, output = Path(source), Path(output)
    write = FORMATS.find(to)
    if dtype not in DTYPES and not (to == "gguf" and dtype == "q8_0"):
        raise UserError(f"--dtype {dtype!r} is not known for {to}; choose f32, f16 or bf16 (gguf: q8_0 too)")
    if output.exists():
        raise UserError(f"{output} exists; name another folder")
    fields.require(weights.read_shape(source).layers, f"export --to {to}")
    model = weights.load(source, dtype=torch.float32)
    unfolded = _with_table(model)
    request = ExportRequest(source, fold_scales(unfolded), dtype)
    own = cost.parameters(unfolded.shape)
    need = None if to == "padded" else own * DTYPES.get(dtype, torch.int8).itemsize
    _check_range(request)
    with new_folder(output, need=need) as aside:
        written = write(request, aside)
        rows = provenance.read_rows(source)
        answer = {"format": to, "dtype": dtype, "model_parameters": own, **written}
        (aside / "README.md").write_text(model_card.write(source, unfolded.shape, answer), encoding="utf-8")
        (aside / "entasis.json").write_text(
            json.dumps({"shape": model.shape.to_dict(), **answer, "layers": rows}, indent=1) + "\n",
            encoding="utf-8",
        )
    return {"output": str(output), **answer}
