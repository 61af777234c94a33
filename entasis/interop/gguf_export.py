"""GGUF for llama.cpp.

| shape                                | layers equal | layers differ, or heads · head_dim is not d_model |
|--------------------------------------|--------------|---------------------------------------------------|
| pre-norm, no QK-norm                 | `llama`      | `deci`                                            |
| pre-norm, per-head QK-norm           | `qwen3`      | `openelm` (tied; equal layers stay `qwen3`)       |
| reordered norm, full-width QK-norm   | `olmo2`      | none                                              |
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from entasis.errors import UserError
from entasis.interop import name_map
from entasis.interop.exporting import FORMATS, ExportRequest
from entasis.interop.gguf_families import ARCHITECTURES
from entasis.interop.hf_export import NO_FORMAT, find_class
from entasis.interop.transforms import ShapedWeights, fill_missing_halves
from entasis.model import rotary
from entasis.shape import layout
from entasis.shape.shapes import ModelShape

if TYPE_CHECKING:
    import gguf

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


@FORMATS.register("gguf")
def write_gguf(request: ExportRequest, folder: Path) -> dict[str, Any]:
    """One file, `model-DTYPE.gguf`, with its tokenizer."""
    import gguf

    from entasis.interop.gguf_tokenizer import write_tokenizer

    shape = request.weights.shape
    arch = _architecture(shape)
    # llama.cpp skips the attention of a layer without FFN, and has no layer without attention in most
    # architectures: what is missing becomes zeros, in widths that can be quantised.
    weights = fill_missing_halves(request.weights, d_ff=32)
    path = folder / f"model-{request.dtype}.gguf"
    writer = gguf.GGUFWriter(path, arch)
    try:
        _write_metadata(writer, request, weights.shape, arch)
        write_tokenizer(writer, request.home, shape.vocabulary, lambda reason: _refusal(shape, reason))
        held, kept = _write_tensors(writer, weights, arch, request.dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return {"architecture": arch, "file": path.name, "kept_in_f16": kept, "parameters": held}


def _architecture(shape: ModelShape) -> str:
    """llama.cpp's name for the shape. Raises `UserError` with the format that can hold it, where one does."""
    kind = (shape.norm_placement, shape.qk_norm)
    uniform = shape.uniform and shape.layers[0].n_heads and shape.layers[0].d_ff
    # llama.cpp's llama and olmo2 have query matrices as wide as the model.
    square = uniform and shape.layers[0].n_heads * shape.head_dim == shape.d_model
    if shape.norm != "rmsnorm" or shape.ffn != "swiglu" or shape.positions != "rope":
        raise _refusal(shape, "these GGUF architectures have RMSNorm, SwiGLU and rotary positions")
    if any(p.is_bias for p in layout.parameters(shape)):
        raise _refusal(shape, "biases are not written to GGUF")
    if kind == ("pre", "none"):
        return "llama" if square else "deci"
    if kind == ("pre", "head"):
        if uniform:
            return "qwen3"
        if not shape.tied_embeddings:
            raise _refusal(
                shape,
                "llama.cpp's openelm, its only one with QK-norm and unequal layers, ties its embeddings",
            )
        return "openelm"
    if kind == ("reordered", "full") and square:
        return "olmo2"
    raise _refusal(shape, f"no GGUF architecture has {kind[0]} norm and QK-norm {kind[1]} with such layers")


def _refusal(shape: ModelShape, reason: str) -> UserError:
    """The error that gives the reason, and the formats that hold the shape where they do."""
    try:
        find_class(shape)
    except UserError:
        return UserError(f"export: {reason}, and {NO_FORMAT}")
    held = "--to hf holds it" if shape.head_bias else "--to hf and --to padded hold it"
    return UserError(f"export: {reason}; {held}")


def _write_metadata(writer: gguf.GGUFWriter, request: ExportRequest, shape: ModelShape, arch: str) -> None:
    import gguf

    writer.add_name(request.folder.resolve().name)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.d_model)
    writer.add_block_count(shape.n_layers)
    one = shape.layers[0]
    per_layer = arch in ("deci", "openelm")
    writer.add_head_count([x.n_heads for x in shape.layers] if per_layer else one.n_heads)
    writer.add_head_count_kv([x.n_kv_heads for x in shape.layers] if per_layer else one.n_kv_heads)
    writer.add_feed_forward_length([x.d_ff for x in shape.layers] if per_layer else one.d_ff)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[request.dtype]])
    scaling = shape.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
    elif scaling.get("rope_type") == "llama3":
        if arch != "llama":
            raise _refusal(shape, f"llama3 rope scaling is not written for {arch}")
        plain = 1.0 / shape.rope_theta ** (torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / rotary.frequencies(shape)).numpy())


def _write_tensors(
    writer: gguf.GGUFWriter, weights: ShapedWeights, arch: str, dtype: str
) -> tuple[int, list[str]]:
    """Adds all tensors; returns how many numbers they are, and our names of those that stay in f16.

    These are the matrices whose rows are no whole blocks of q8_0.
    """
    import gguf

    stored, kept = name_map.list_tensors(ARCHITECTURES[arch].names, weights.shape), []
    for tensor in stored:
        kind = gguf.GGMLQuantizationType[dtype.upper() if len(tensor.size) > 1 else "F32"]
        if kind.name == "Q8_0" and tensor.size[1] % 32:
            kind = gguf.GGMLQuantizationType.F16
            kept += [p.name for p in tensor.parameters]
        data = np.ascontiguousarray(tensor.join(weights.tensors).float().numpy())
        writer.add_tensor(tensor.name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    return sum(tensor.count for tensor in stored), kept
