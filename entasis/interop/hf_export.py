"""Hugging Face folders: one of transformers' own classes where layers are equal, our own modeling file where not.

| norm      | FFN    | norm placement | QK-norm    | class       |
|-----------|--------|----------------|------------|-------------|
| RMSNorm   | SwiGLU | pre            | none       | Llama       |
| RMSNorm   | SwiGLU | pre            | per head   | Qwen3       |
| RMSNorm   | SwiGLU | reordered      | full width | OLMo2       |
| LayerNorm | GELU   | pre            | none       | Starcoder2  |
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from entasis.errors import UserError
from entasis.interop import name_map
from entasis.interop.exporting import DTYPES, FORMATS, ExportRequest
from entasis.interop.hf_families import FAMILIES, Family
from entasis.interop.hf_unequal import WIDTH_KEYS
from entasis.interop.transforms import (
    ShapedWeights,
    fill_biases,
    fill_missing_halves,
    find_widest,
    pad_layers,
)
from entasis.model import weights_writer
from entasis.shape import fields, layout
from entasis.shape.shapes import ModelShape


@dataclass(frozen=True)
class _Class:
    """A transformers class that a shape fits."""

    family: Family
    biased_parts: tuple[str, ...]
    """The parts that may have biases."""
    heads_must_divide: bool
    """Whether its config refuses head counts that do not divide the hidden size."""
    norm: str = "rmsnorm"
    ffn: Mapping[str, str] = field(default_factory=lambda: {"swiglu": "silu"})
    """The kinds of FFN that it has, and their names in its config."""
    biases: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"attention_bias": ("qkv_bias", "attention_output_bias")}
    )
    """The keys of its config that give biases, each with the fields of a shape that it gives all of them to."""

    @property
    def model_type(self) -> str:
        return self.family.model_types[0]

    @property
    def name(self) -> str:
        """`Llama`, with which the names of the family's classes begin."""
        return self.family.architectures[0].removesuffix("ForCausalLM")


NO_FORMAT = "no format here holds it; `entasis generate` and `entasis evaluate` open the model as it is"
_CLASSES = {
    ("rmsnorm", "pre", "none"): _Class(
        FAMILIES["llama"],
        ("attention", "feedforward"),
        heads_must_divide=True,
        biases={"attention_bias": ("qkv_bias", "attention_output_bias"), "mlp_bias": ("ffn_bias",)},
    ),
    ("rmsnorm", "pre", "head"): _Class(FAMILIES["qwen3"], ("attention",), heads_must_divide=False),
    ("rmsnorm", "reordered", "full"): _Class(FAMILIES["olmo2"], ("attention",), heads_must_divide=False),
    ("layernorm", "pre", "none"): _Class(
        FAMILIES["starcoder2"],
        ("attention", "feedforward", "norms", "final_norm", "head"),
        heads_must_divide=True,
        norm="layernorm",
        ffn={"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"},
        biases={"use_bias": ("qkv_bias", "attention_output_bias", "ffn_bias")},
    ),
}


@FORMATS.register("hf")
def write_hf(request: ExportRequest, folder: Path) -> dict[str, Any]:
    """transformers' own class for equal layers, else a folder with its modeling file (remote code)."""
    kind, shape = find_class(request.weights.shape), request.weights.shape
    one = shape.layers[0]
    fits = one.n_heads and one.d_ff and (not kind.heads_must_divide or shape.d_model % one.n_heads == 0)
    if shape.uniform and fits and not shape.head_bias:
        return _write_plain(request, request.weights, kind, folder)
    # transformers' layers always have both halves.
    weights = fill_missing_halves(request.weights, d_ff=1)
    # transformers before 5 keeps the code of folders of one name in one place: other code needs another name.
    code = f"modeling_entasis_{kind.model_type}"
    config = _config(weights.shape, kind, request) | {
        "model_type": f"entasis_{kind.model_type}",
        "architectures": ["EntasisForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{code}.EntasisConfig",
            "AutoModel": f"{code}.EntasisModel",
            "AutoModelForCausalLM": f"{code}.EntasisForCausalLM",
        },
        "per_layer_config": {
            str(i): {key: getattr(x, name) for key, name in zip(WIDTH_KEYS, fields.WIDTHS, strict=True)}
            for i, x in enumerate(weights.shape.layers)
        },
    }
    text = (resources.files("entasis.interop") / "modeling_template.py").read_text(encoding="utf-8")
    text = text.replace("llama", kind.model_type).replace("Llama", kind.name)
    if kind.norm == "layernorm":
        text = text.replace(f"    {kind.name}RMSNorm,\n", "")
        text = text.replace(f"{kind.name}RMSNorm", "nn.LayerNorm").replace("rms_norm_eps", "norm_epsilon")
    (folder / f"{code}.py").write_text(text, encoding="utf-8")
    held = _write(request, weights, kind, config, folder)
    return {
        "class": f"{code}.py over {kind.name}DecoderLayer",
        "remote_code": True,
        "parameters": held,
    }


@FORMATS.register("padded")
def write_padded(request: ExportRequest, folder: Path) -> dict[str, Any]:
    """Every layer zero-padded to the widest: a plain folder that any tool opens, without the savings."""
    kind, shape = find_class(request.weights.shape), request.weights.shape

    if shape.head_bias:
        raise UserError(
            f"export: {kind.name} has no bias on its head; --to hf writes a folder of its own code"
        )

    def is_valid(heads: int) -> bool:
        return not kind.heads_must_divide or shape.d_model % heads == 0

    weights = pad_layers(request.weights, [find_widest(shape, is_valid)] * shape.n_layers)
    return _write_plain(request, weights, kind, folder)


def _write_plain(
    request: ExportRequest, weights: ShapedWeights, kind: _Class, folder: Path
) -> dict[str, Any]:
    config = _config(weights.shape, kind, request) | {
        "model_type": kind.model_type,
        "architectures": [f"{kind.name}ForCausalLM"],
    }
    if weights.shape.rope_scaling:
        # Our own modeling file finds it in rope_parameters; transformers 5 warns of it in a config it does not know.
        config["rope_scaling"] = dict(weights.shape.rope_scaling)
    held = _write(request, weights, kind, config, folder)
    return {"class": f"{kind.name}ForCausalLM", "remote_code": False, "parameters": held}


def find_class(shape: ModelShape) -> _Class:
    """The class for a shape. Raises `UserError` naming what none of them has."""
    kind = _CLASSES.get((shape.norm, shape.norm_placement, shape.qk_norm))
    reason = None
    if shape.positions != "rope" or not any(
        shape.norm == k.norm and shape.ffn in k.ffn for k in _CLASSES.values()
    ):
        reason = "Llama, Qwen3 and OLMo2 have RMSNorm, SwiGLU and rotary positions, Starcoder2 LayerNorm, GELU and those"
    elif kind is None:
        reason = f"no class there has {shape.norm_placement} norm with QK-norm {shape.qk_norm}"
    elif any(p.is_bias and p.part not in kind.biased_parts for p in layout.parameters(shape)):
        reason = f"{kind.name} has no bias there"
    if reason or kind is None:
        raise UserError(f"export: {reason}, and {NO_FORMAT}")
    return kind


def _config(shape: ModelShape, kind: _Class, request: ExportRequest) -> dict[str, Any]:
    rope = {"rope_type": "default", **(shape.rope_scaling or {}), "rope_theta": shape.rope_theta}
    widest = {
        key: max(getattr(x, n) for x in shape.layers)
        for key, n in zip(WIDTH_KEYS, fields.WIDTHS, strict=True)
    }
    config = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.d_model,
        "num_hidden_layers": shape.n_layers,
        **widest,
        "head_dim": shape.head_dim,
        "hidden_act": kind.ffn[shape.ffn],
        "max_position_embeddings": shape.context,
        "rms_norm_eps" if kind.norm == "rmsnorm" else "norm_epsilon": shape.norm_eps,
        "tie_word_embeddings": shape.tied_embeddings,
        **{key: any(getattr(shape, name) for name in given) for key, given in kind.biases.items()},
        # transformers 5 reads the first, earlier ones the second and, where there is any, `rope_scaling`.
        "rope_parameters": rope,
        "rope_theta": shape.rope_theta,
        "bos_token_id": request.ends.begin,
        "eos_token_id": request.ends.end,
        "dtype": str(DTYPES[request.dtype]).removeprefix("torch."),
        "use_cache": True,
    }
    return config | ({"head_bias": True} if shape.head_bias else {})


def _write(
    request: ExportRequest, weights: ShapedWeights, kind: _Class, config: dict[str, Any], folder: Path
) -> int:
    """Writes everything but code and card; returns how many numbers the weights are."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # One switch there for several, and LayerNorm has a bias always.
    filled = [name for key, given in kind.biases.items() if config[key] for name in given]
    weights = fill_biases(weights, *filled, *(["norm_bias"] if kind.norm == "layernorm" else []))
    dtype = DTYPES[request.dtype]
    stored = name_map.list_tensors(kind.family.names, weights.shape)
    described = {tensor.name: (dtype, tensor.size) for tensor in stored}
    rounded = ((tensor.name, tensor.join(weights.tensors).to(dtype)) for tensor in stored)
    weights_writer.write(folder / "model.safetensors", described, rounded)
    if request.tokenizer.is_file():
        shutil.copyfile(request.tokenizer, folder / "tokenizer.json")
        config_file = request.home / "tokenizer_config.json"
        if config_file.is_file():
            shutil.copyfile(config_file, folder / "tokenizer_config.json")
        else:
            from entasis.data.tokenizer import load

            chosen = load(request.tokenizer)
            end = None if chosen.end_of_text is None else chosen.library.id_to_token(chosen.end_of_text)
            answer = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": end,
                "bos_token": end,
                "model_max_length": weights.shape.context,
                "clean_up_tokenization_spaces": False,
            }
            (folder / "tokenizer_config.json").write_text(
                json.dumps(answer, indent=2) + "\n", encoding="utf-8"
            )
    if request.ends.end is not None:
        generation = {"eos_token_id": request.ends.stops, "bos_token_id": request.ends.begin}
        (folder / "generation_config.json").write_text(json.dumps(generation) + "\n", encoding="utf-8")
    return sum(tensor.count for tensor in stored)
