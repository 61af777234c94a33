"""GGUF for llama.cpp.

| shape                                | layers equal | layers differ, or heads · head_dim is not d_model |
|--------------------------------------|--------------|---------------------------------------------------|
| pre-norm, no QK-norm                 | `llama`      | `deci`                                            |
| pre-norm, per-head QK-norm           | `qwen3`      | `openelm` (tied; equal layers stay `qwen3`)       |
| reordered norm, full-width QK-norm   | `olmo2`      | none                                              |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from entasis.errors import UserError
from entasis.interop.equivalent import Drawing, padded
from entasis.interop.exporting import Source, register
from entasis.interop.gguf_families import GGUF_MODULES
from entasis.interop.hf_export import NO_FORMAT, class_of
from entasis.model import rotary
from entasis.shape.shapes import LayerShape, ModelShape

_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_KINDS = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
_REORDERED = {"attention_norm": "post_attention_norm", "feedforward_norm": "post_ffw_norm"}


@register("gguf")
def export(source: Source, folder: Path) -> dict[str, Any]:
    """One file, `model-DTYPE.gguf`, with its tokenizer."""
    shape = source.drawing.shape
    arch = _architecture(shape)
    # llama.cpp skips the attention of a layer without FFN, and has no layer without attention in most
    # architectures: what is missing becomes zeros, in widths that can be quantised.
    filled = [
        LayerShape(x.n_heads or 1, x.n_kv_heads or 1, x.d_ff or 32) if not (x.n_heads and x.d_ff) else x
        for x in shape.layers
    ]
    drawing = padded(source.drawing, filled)
    path = folder / f"model-{source.dtype}.gguf"
    writer = gguf.GGUFWriter(path, arch)
    try:
        _metadata(writer, source, drawing.shape, arch)
        _tokenizer(writer, source, shape.vocabulary)
        kept = _tensors(writer, drawing, arch, source.dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    held = sum(tensor.numel() for tensor in drawing.tensors.values())
    return {"architecture": arch, "file": path.name, "kept_in_f16": kept, "parameters": held}


def _architecture(shape: ModelShape) -> str:
    """llama.cpp's name for the shape. Raises `UserError` with the format that can hold it, where one does."""
    kind = (shape.norm_placement, shape.qk_norm)
    uniform = shape.uniform and shape.layers[0].n_heads and shape.layers[0].d_ff
    # llama.cpp's llama and olmo2 have query matrices as wide as the model.
    square = uniform and shape.layers[0].n_heads * shape.head_dim == shape.d_model
    biased = shape.qkv_bias or shape.attention_output_bias or shape.ffn_bias or shape.head_bias
    if shape.norm != "rmsnorm" or shape.ffn != "swiglu" or shape.positions != "rope":
        raise _refusal(shape, "these GGUF architectures have RMSNorm, SwiGLU and rotary positions")
    if biased:
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
        class_of(shape)
    except UserError:
        return UserError(f"export: {reason}, and {NO_FORMAT}")
    return UserError(f"export: {reason}; --to hf and --to padded hold it")


def _metadata(writer: gguf.GGUFWriter, source: Source, shape: ModelShape, arch: str) -> None:
    writer.add_name(source.folder.resolve().name)
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
    writer.add_file_type(_FILE_TYPES[source.dtype])
    scaling = shape.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
    elif scaling.get("rope_type") == "llama3":
        if arch != "llama":
            raise _refusal(shape, f"llama3 rope scaling is not written for {arch}")
        plain = 1.0 / shape.rope_theta ** (torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / rotary.frequencies(shape)).numpy())


def _tensors(writer: gguf.GGUFWriter, drawing: Drawing, arch: str, dtype: str) -> list[str]:
    """Adds all tensors; returns those whose rows are no whole blocks of q8_0 and stay in f16."""
    shape, tensors = drawing.shape, dict(drawing.tensors)
    for i, layer in enumerate(shape.layers):
        prefix = f"blocks.{i}.attention"
        if arch in ("llama", "deci"):
            for part, heads in (("query", layer.n_heads), ("key", layer.n_kv_heads)):
                tensors[f"{prefix}.{part}.weight"] = _interleaved(tensors[f"{prefix}.{part}.weight"], heads)
        if arch == "openelm":
            parts = [tensors.pop(f"{prefix}.{part}.weight") for part in ("query", "key", "value")]
            tensors[f"{prefix}.qkv.weight"] = torch.cat(parts)
    kept = []
    for name, tensor in tensors.items():
        data = tensor.float().numpy()
        kind = _KINDS["f32"] if tensor.ndim == 1 else _KINDS[dtype]
        if dtype == "q8_0" and tensor.ndim == 2 and tensor.shape[1] % 32:
            kind = _KINDS["f16"]
            kept.append(name)
        writer.add_tensor(
            _name(name, arch), gguf.quants.quantize(np.ascontiguousarray(data), kind), raw_dtype=kind
        )
    return kept


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from half-split to interleaved rotary order, as arch llama turns them."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _name(name: str, arch: str) -> str:
    owner, _, leaf = name.rpartition(".")
    if owner in GGUF_MODULES:
        return f"{GGUF_MODULES[owner]}.{leaf}"
    _, index, part = owner.split(".", 2)
    if part == "attention.qkv":
        return f"blk.{index}.attn_qkv.{leaf}"
    if arch == "olmo2" and part in _REORDERED:
        return f"blk.{index}.{_REORDERED[part]}.{leaf}"
    return GGUF_MODULES[f"blocks.{{i}}.{part}"].replace("{i}", index) + f".{leaf}"


def _tokenizer(writer: gguf.GGUFWriter, source: Source, vocabulary: int) -> None:
    shape = source.drawing.shape
    if not source.tokenizer.is_file():
        raise _refusal(shape, f"{source.folder} has no tokenizer.json, without which llama.cpp opens no file")
    content = json.loads(source.tokenizer.read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise _refusal(shape, "only byte-level BPE tokenizers are written to GGUF")
    tokens = [f"[unused{i}]" for i in range(vocabulary)]
    types = [int(gguf.TokenType.UNUSED)] * vocabulary
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, int(gguf.TokenType.NORMAL)
    for added in content.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(content, shape))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # llama.cpp wants the list; one merge of two tokens that never stand together is none.
    writer.add_token_merges(merges or [f"{tokens[0]} {tokens[0]}"])
    from entasis.data.tokenizer import load

    if (end := load(source.tokenizer).end_of_text) is not None:
        writer.add_bos_token_id(end)
        writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)
    settings = source.folder / "tokenizer_config.json"
    if settings.is_file():
        template = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
        if isinstance(template, str):
            writer.add_chat_template(template)


def _pre_tokenizer(content: dict[str, Any], shape: ModelShape) -> str:
    """llama.cpp's name for how text is split before BPE. Raises `UserError` for one it has no name for."""
    parts = content.get("pre_tokenizer") or {}
    steps = parts.get("pretokenizers", [parts])
    kinds = [step.get("type") for step in steps]
    patterns = " ".join(str(step.get("pattern", "")) for step in steps)
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        return "llama-bpe" if "{1,3}" in patterns else "qwen2"
    raise _refusal(
        shape, f"llama.cpp has no name for the tokenizer's splitting ({', '.join(map(str, kinds))})"
    )
