"""Hugging Face folders: a plain Llama, Qwen3 or OLMo2 where layers are equal, our own modeling file where not.

| norm placement | QK-norm    | class  |
|----------------|------------|--------|
| pre            | none       | Llama  |
| pre            | per head   | Qwen3  |
| reordered      | full width | OLMo2  |
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from entasis.errors import UserError
from entasis.interop import weights_writer
from entasis.interop.equivalent import Drawing, padded, widest
from entasis.interop.exporting import DTYPES, Source, register
from entasis.shape.shapes import LayerShape, ModelShape


@dataclass(frozen=True)
class _Class:
    """A transformers class that a shape fits."""

    name: str
    model_type: str
    has_mlp_bias: bool
    heads_must_divide: bool
    """Whether its config refuses head counts that do not divide the hidden size."""
    norms: dict[str, str]


NO_FORMAT = "no format here holds it; `entasis generate` and `entasis evaluate` open the model as it is"
_PRE = {"attention_norm": "input_layernorm", "feedforward_norm": "post_attention_layernorm"}
_REORDERED = {"attention_norm": "post_attention_layernorm", "feedforward_norm": "post_feedforward_layernorm"}
_CLASSES = {
    ("pre", "none"): _Class("Llama", "llama", True, True, _PRE),
    ("pre", "head"): _Class("Qwen3", "qwen3", False, False, _PRE),
    ("reordered", "full"): _Class("Olmo2", "olmo2", False, False, _REORDERED),
}
_PARTS = {
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feedforward.gate": "mlp.gate_proj",
    "feedforward.up": "mlp.up_proj",
    "feedforward.down": "mlp.down_proj",
}
_WHOLE = {"embedding.tokens": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


@register("hf")
def hf(source: Source, folder: Path) -> dict[str, Any]:
    """transformers' own class for equal layers, else a folder with its modeling file (remote code)."""
    kind, shape = class_of(source.drawing.shape), source.drawing.shape
    one = shape.layers[0]
    whole = one.n_heads and one.d_ff and (not kind.heads_must_divide or shape.d_model % one.n_heads == 0)
    if shape.uniform and whole:
        return _plain(source, source.drawing, kind, folder)
    # A half that is missing becomes one of zeros: transformers' layers always have both.
    filled = [
        LayerShape(x.n_heads or 1, x.n_kv_heads or 1, x.d_ff or 1) if not (x.n_heads and x.d_ff) else x
        for x in shape.layers
    ]
    drawing = padded(source.drawing, filled)
    # transformers before 5 keeps the code of folders of one name in one place: other code needs another name.
    code = f"modeling_entasis_{kind.model_type}"
    config = _config(drawing.shape, kind, source) | {
        "model_type": f"entasis_{kind.model_type}",
        "architectures": ["EntasisForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{code}.EntasisConfig",
            "AutoModel": f"{code}.EntasisModel",
            "AutoModelForCausalLM": f"{code}.EntasisForCausalLM",
        },
        "per_layer_config": {
            str(i): {
                "num_attention_heads": x.n_heads,
                "num_key_value_heads": x.n_kv_heads,
                "intermediate_size": x.d_ff,
            }
            for i, x in enumerate(drawing.shape.layers)
        },
    }
    text = (resources.files("entasis.interop") / "modeling_template.py").read_text(encoding="utf-8")
    text = text.replace("llama", kind.model_type).replace("Llama", kind.name)
    (folder / f"{code}.py").write_text(text, encoding="utf-8")
    held = _write(source, drawing, kind, config, folder)
    return {
        "class": f"{code}.py over {kind.name}DecoderLayer",
        "remote_code": True,
        "parameters": held,
    }


@register("padded")
def uniform(source: Source, folder: Path) -> dict[str, Any]:
    """Every layer zero-padded to the widest: a plain folder that any tool opens, without the savings."""
    kind, shape = class_of(source.drawing.shape), source.drawing.shape

    def valid(heads: int) -> bool:
        return not kind.heads_must_divide or shape.d_model % heads == 0

    drawing = padded(source.drawing, [widest(shape, valid)] * shape.n_layers)
    return _plain(source, drawing, kind, folder)


def _plain(source: Source, drawing: Drawing, kind: _Class, folder: Path) -> dict[str, Any]:
    config = _config(drawing.shape, kind, source) | {
        "model_type": kind.model_type,
        "architectures": [f"{kind.name}ForCausalLM"],
    }
    if drawing.shape.rope_scaling:
        # Our own modeling file finds it in rope_parameters; transformers 5 warns of it in a config it does not know.
        config["rope_scaling"] = dict(drawing.shape.rope_scaling)
    held = _write(source, drawing, kind, config, folder)
    return {"class": f"{kind.name}ForCausalLM", "remote_code": False, "parameters": held}


def class_of(shape: ModelShape) -> _Class:
    """The class for a shape. Raises `UserError` naming what none of them has."""
    kind = _CLASSES.get((shape.norm_placement, shape.qk_norm))
    reason = None
    if shape.norm != "rmsnorm" or shape.ffn != "swiglu" or shape.positions != "rope":
        reason = "Llama, Qwen3 and OLMo2 have RMSNorm, SwiGLU and rotary positions"
    elif kind is None:
        reason = f"no class there has {shape.norm_placement} norm with QK-norm {shape.qk_norm}"
    elif shape.head_bias or (shape.ffn_bias and not kind.has_mlp_bias):
        reason = f"{kind.name} has no bias there"
    if reason or kind is None:
        raise UserError(f"export: {reason}, and {NO_FORMAT}")
    return kind


def _config(shape: ModelShape, kind: _Class, source: Source) -> dict[str, Any]:
    end = _end_of_text(source)
    rope = {"rope_type": "default", **(shape.rope_scaling or {}), "rope_theta": shape.rope_theta}
    config = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.d_model,
        "intermediate_size": max(x.d_ff for x in shape.layers),
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": max(x.n_heads for x in shape.layers),
        "num_key_value_heads": max(x.n_kv_heads for x in shape.layers),
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tied_embeddings,
        "attention_bias": shape.qkv_bias or shape.attention_output_bias,
        # transformers 5 reads the first, earlier ones the second and, where there is any, `rope_scaling`.
        "rope_parameters": rope,
        "rope_theta": shape.rope_theta,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": str(DTYPES[source.dtype]).removeprefix("torch."),
        "use_cache": True,
    }
    return config | ({"mlp_bias": shape.ffn_bias} if kind.has_mlp_bias else {})


def _write(source: Source, drawing: Drawing, kind: _Class, config: dict[str, Any], folder: Path) -> int:
    """Writes everything but code and card; returns how many numbers the weights are."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shape, tensors = drawing.shape, dict(drawing.tensors)
    if config["attention_bias"]:
        # One switch there for all four, so those without a bias here get one of zeros.
        like = tensors["norm.weight"]
        for i in range(shape.n_layers):
            for part in ("query", "key", "value", "output"):
                rows = tensors[f"blocks.{i}.attention.{part}.weight"].shape[0]
                tensors.setdefault(f"blocks.{i}.attention.{part}.bias", like.new_zeros(rows))
    dtype = DTYPES[source.dtype]
    named = {_name(name, kind): tensor for name, tensor in tensors.items()}
    described = {name: (dtype, tuple(tensor.shape)) for name, tensor in named.items()}
    rounded = ((name, tensor.to(dtype)) for name, tensor in named.items())
    weights_writer.write(folder / "model.safetensors", described, rounded)
    if source.tokenizer.is_file():
        shutil.copyfile(source.tokenizer, folder / "tokenizer.json")
        settings = source.folder / "tokenizer_config.json"
        if settings.is_file():
            shutil.copyfile(settings, folder / "tokenizer_config.json")
        else:
            from entasis.data.tokenizer import load

            chosen = load(source.tokenizer)
            end = None if chosen.end_of_text is None else chosen.library.id_to_token(chosen.end_of_text)
            answer = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": end,
                "bos_token": end,
                "model_max_length": shape.context,
                "clean_up_tokenization_spaces": False,
            }
            (folder / "tokenizer_config.json").write_text(
                json.dumps(answer, indent=2) + "\n", encoding="utf-8"
            )
    if (end := config["eos_token_id"]) is not None:
        generation = {"eos_token_id": end, "bos_token_id": end}
        (folder / "generation_config.json").write_text(json.dumps(generation) + "\n", encoding="utf-8")
    return sum(tensor.numel() for tensor in named.values())


def _name(name: str, kind: _Class) -> str:
    owner, _, leaf = name.rpartition(".")
    if owner in _WHOLE:
        return f"{_WHOLE[owner]}.{leaf}"
    _, index, part = owner.split(".", 2)
    return f"model.layers.{index}.{kind.norms.get(part) or _PARTS[part]}.{leaf}"


def _end_of_text(source: Source) -> int | None:
    if not source.tokenizer.is_file():
        return None
    from entasis.data.tokenizer import load

    return load(source.tokenizer).end_of_text
