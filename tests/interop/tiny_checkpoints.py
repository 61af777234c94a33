"""Tiny random checkpoints of every family, made by others' code: transformers and gguf-py.

OpenELM and DeciLM are not in transformers, so their reference forward passes are written here: DeciLM's from
transformers' own Llama parts, OpenELM's by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

VOCABULARY = 160
SAME = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128,
}  # fmt: skip
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": VOCABULARY}
NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

CASES = {
    "llama": ("Llama", {}),
    "llama-tied-biases": (
        "Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    ),
    "llama-llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": (
        "Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-5}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2", {}),
    "starcoder2": ("Starcoder2", {}),
    "starcoder2-no-biases": ("Starcoder2", {"use_bias": False, "hidden_act": "gelu", "tie_word_embeddings": False}),
    "gpt2": ("GPT2", {"n_inner": 192}),
    "gpt2-unscaled": ("GPT2", {"scale_attn_weights": False, "activation_function": "gelu"}),
}  # fmt: skip


def hugging_face(kind: str, seed: int = 0, **changes: object) -> torch.nn.Module:
    """A transformers model of random weights; every norm and bias too differs from its neutral value."""
    import transformers

    name, extra = CASES[kind]
    config_class = getattr(transformers, f"{name}Config")
    fields = {**(GPT2 if name == "GPT2" else SAME), **NO_ENDS, **extra, **changes}
    model_class = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    torch.manual_seed(seed)
    model = model_class(config_class(**fields)).eval()
    randomise(model)
    return model


def randomise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            one = 1.0 if ("norm" in name or ".ln_" in name) and name.endswith("weight") else 0.0
            parameter.normal_(0, 0.08).add_(one)


def tokens(batch: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


# OpenELM, by hand

OPENELM = {
    "model_type": "openelm", "architectures": ["OpenELMForCausalLM"], "model_dim": 64, "head_dim": 16,
    "num_transformer_layers": 3, "num_query_heads": [2, 4, 6], "num_kv_heads": [1, 2, 3], "num_gqa_groups": 2,
    "ffn_multipliers": [0.5, 1.3, 2.0], "ffn_dim_divisor": 16, "ffn_with_glu": True, "vocab_size": VOCABULARY,
    "normalize_qk_projections": True, "share_input_output_layers": True, "rope_freq_constant": 10000,
    "max_context_length": 128, "activation_fn_name": "swish", "normalization_layer_name": "rms_norm",
    "auto_map": {"AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM"},
}  # fmt: skip
OPENELM_D_FF = [32, 80, 128]


def openelm_weights(seed: int = 1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)

    def linear(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g) * 0.08

    def norm(width: int) -> torch.Tensor:
        return 1 + linear(width)

    d, hd = 64, 16
    w = {"transformer.token_embeddings.weight": linear(VOCABULARY, d), "transformer.norm.weight": norm(d)}
    for i, (q, kv, ff) in enumerate(zip([2, 4, 6], [1, 2, 3], OPENELM_D_FF, strict=True)):
        at = f"transformer.layers.{i}"
        w[f"{at}.attn.qkv_proj.weight"] = linear((q + 2 * kv) * hd, d)
        w[f"{at}.attn.out_proj.weight"] = linear(d, q * hd)
        w[f"{at}.attn.q_norm.weight"], w[f"{at}.attn.k_norm.weight"] = norm(hd), norm(hd)
        w[f"{at}.ffn.proj_1.weight"], w[f"{at}.ffn.proj_2.weight"] = linear(2 * ff, d), linear(d, ff)
        w[f"{at}.attn_norm.weight"], w[f"{at}.ffn_norm.weight"] = norm(d), norm(d)
    return w


def openelm_logits(w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """corenet's OpenELM: pre-norm, fused qkv, per-head QK-norm before RoPE, gated FFN with the gate first."""
    hd, t = 16, ids.shape[1]

    def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    angles = torch.outer(torch.arange(t), 10000.0 ** (-torch.arange(0, hd, 2) / hd)).repeat(1, 2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    x = w["transformer.token_embeddings.weight"][ids]
    for i, (nq, nkv) in enumerate(zip([2, 4, 6], [1, 2, 3], strict=True)):
        at = f"transformer.layers.{i}"
        h = rms(x, w[f"{at}.attn_norm.weight"])
        qkv = (h @ w[f"{at}.attn.qkv_proj.weight"].T).unflatten(-1, (-1, hd)).transpose(1, 2)
        q, k, v = qkv.split([nq, nkv, nkv], 1)
        q, k = rotate(rms(q, w[f"{at}.attn.q_norm.weight"])), rotate(rms(k, w[f"{at}.attn.k_norm.weight"]))
        k, v = k.repeat_interleave(nq // nkv, 1), v.repeat_interleave(nq // nkv, 1)
        scores = q @ k.transpose(-1, -2) / hd**0.5
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), float("-inf"))
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ w[f"{at}.attn.out_proj.weight"].T
        gate, up = (rms(x, w[f"{at}.ffn_norm.weight"]) @ w[f"{at}.ffn.proj_1.weight"].T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ w[f"{at}.ffn.proj_2.weight"].T
    return rms(x, w["transformer.norm.weight"]) @ w["transformer.token_embeddings.weight"].T


# DeciLM, from transformers' Llama parts

_ON = {"no_op": False, "replace_with_linear": False}
_OFF = {"no_op": True, "replace_with_linear": False}
DECI = {
    **SAME, "model_type": "nemotron-nas", "architectures": ["DeciLMForCausalLM"], "hidden_act": "silu",
    "num_hidden_layers": 5, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "num_key_value_heads": None, "intermediate_size": None,
    "block_configs": [
        {"attention": {**_ON, "n_heads_in_group": 2}, "ffn": {**_ON, "ffn_mult": 1.5}},
        {"attention": {**_OFF, "n_heads_in_group": None}, "ffn": {**_ON, "ffn_mult": 8.0}},
        {"attention": {**_OFF, "n_heads_in_group": None}, "ffn": {**_OFF, "ffn_mult": None}},
        {"attention": {**_ON, "n_heads_in_group": 4}, "ffn": {**_OFF, "ffn_mult": None}},
        {"attention": {**_ON, "n_heads_in_group": 1}, "ffn": {**_ON, "intermediate_size": 48}},
    ],
}  # fmt: skip
DECI_LAYERS = [(4, 2, 256), (0, 0, 512), (0, 0, 0), (4, 1, 0), (4, 4, 48)]


class DeciLM(torch.nn.Module):
    """transformers' Llama attention, FFN and norms, put together as `sizes` says."""

    def __init__(self, sizes: list[tuple[int, int, int]] = DECI_LAYERS) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama import modeling_llama as llama

        super().__init__()
        self.sizes = sizes
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(VOCABULARY, 64)
        self.model.layers = torch.nn.ModuleList()
        for i, (heads, kv_heads, d_ff) in enumerate(sizes):
            config = LlamaConfig(
                hidden_size=64, num_attention_heads=4, num_key_value_heads=kv_heads or 1,
                intermediate_size=d_ff or 1, head_dim=16, rms_norm_eps=1e-5, attn_implementation="eager",
            )  # fmt: skip
            layer = torch.nn.Module()
            if heads:
                layer.input_layernorm = llama.LlamaRMSNorm(64, 1e-5)
                layer.self_attn = llama.LlamaAttention(config, i)
            if d_ff:
                layer.post_attention_layernorm = llama.LlamaRMSNorm(64, 1e-5)
                layer.mlp = llama.LlamaMLP(config)
            self.model.layers.append(layer)
        self.model.norm = llama.LlamaRMSNorm(64, 1e-5)
        self.lm_head = torch.nn.Linear(64, VOCABULARY, bias=False)
        self.rotary = llama.LlamaRotaryEmbedding(config)
        randomise(self)

    @torch.no_grad()
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, t = self.model.embed_tokens(ids), ids.shape[1]
        rotations = self.rotary(x, torch.arange(t)[None])
        mask = torch.full((t, t), float("-inf")).triu(1)[None, None]
        for layer in self.model.layers:
            if hasattr(layer, "self_attn"):
                x = x + layer.self_attn(layer.input_layernorm(x), rotations, mask)[0]
            if hasattr(layer, "mlp"):
                x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.lm_head(self.model.norm(x))


def save_folder(folder: Path, config: dict[str, object], weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


# GGUF, through gguf-py


def byte_vocabulary(writer: gguf.GGUFWriter, size: int = VOCABULARY) -> None:
    """A vocabulary of letters that llama.cpp accepts; the tests give it token ids."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    words = [chr(0x100 + i) for i in range(size)]
    words[-1] = words[0] + words[1]
    writer.add_token_list(words)
    writer.add_token_types([1] * size)
    writer.add_token_merges([f"{words[0]} {words[1]}"])


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Half-split → interleaved, as llama.cpp's converter does."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def gguf_of_hugging_face(
    path: Path,
    kind: str,
    model: torch.nn.Module,
    quantise: str = "F32",
    n_tokens: int = VOCABULARY,
    write_vocabulary: Callable[[gguf.GGUFWriter, int], None] = byte_vocabulary,
    tensors_a_part: int = 0,
) -> Path:
    """The GGUF of a transformers model, with the names of gguf-py's own tables."""
    arch = {"mistral": "llama"}.get(kind.split("-")[0], kind.split("-")[0])
    c = model.config
    n_layers = c.num_hidden_layers
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=tensors_a_part)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_block_count(n_layers)
    writer.add_embedding_length(c.hidden_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    write_vocabulary(writer, n_tokens)
    if arch == "gpt2":
        writer.add_feed_forward_length(c.n_inner or 4 * c.n_embd)
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
    else:
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        writer.add_feed_forward_length(c.intermediate_size)
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
        writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
        writer.add_vocab_size(c.vocab_size)
        _rope_scaling(writer, model)
    names = gguf.get_tensor_name_map(_arch(arch), n_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        data = tensor.float().numpy()
        if arch == "gpt2" and tensor.ndim == 2 and ".h." in name:
            data = np.ascontiguousarray(data.T)
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            data = permute(data, c.num_attention_heads if "q_proj" in name else c.num_key_value_heads)
        write_tensor(writer, names.get_name(name, (".weight", ".bias")), data, quantise)
    finish(writer)
    return path


def _arch(name: str) -> gguf.MODEL_ARCH:
    return next(arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == name)


def _rope_scaling(writer: gguf.GGUFWriter, model: torch.nn.Module) -> None:
    asked = model.config.rope_parameters
    if asked["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(asked["factor"])
    if asked["rope_type"] == "llama3":
        head_dim = model.config.head_dim
        plain = asked["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
        scaled = model.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))


def write_tensor(writer: gguf.GGUFWriter, name: str, data: np.ndarray, quantise: str = "F32") -> None:
    kind = gguf.GGMLQuantizationType[quantise if data.ndim == 2 else "F32"]
    data = np.ascontiguousarray(data, np.float32)
    writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_openelm(path: Path, w: dict[str, torch.Tensor]) -> Path:
    writer = gguf.GGUFWriter(path, "openelm")
    _unequal(writer, [2, 4, 6], [1, 2, 3], OPENELM_D_FF, 1e-6)
    names = {"token_embeddings": "token_embd", "transformer.norm": "output_norm"}
    inner = {"attn.qkv_proj": "attn_qkv", "attn.out_proj": "attn_output", "attn.q_norm": "attn_q_norm",
             "attn.k_norm": "attn_k_norm", "ffn.proj_2": "ffn_down", "attn_norm": "attn_norm",
             "ffn_norm": "ffn_norm"}  # fmt: skip
    for name, tensor in w.items():
        data = tensor.numpy()
        if ".layers." not in name:
            theirs = next(v for k, v in names.items() if k in name)
            write_tensor(writer, f"{theirs}.weight", data)
            continue
        _, _, i, rest = name.removesuffix(".weight").split(".", 3)
        if rest == "ffn.proj_1":
            for part, half in zip(("gate", "up"), np.split(data, 2), strict=True):
                write_tensor(writer, f"blk.{i}.ffn_{part}.weight", half)
        else:
            write_tensor(writer, f"blk.{i}.{inner[rest]}.weight", data)
    finish(writer)
    return path


def gguf_deci(path: Path, model: DeciLM) -> Path:
    writer = gguf.GGUFWriter(path, "deci")
    heads, kv_heads, d_ffs = (list(column) for column in zip(*model.sizes, strict=True))
    _unequal(writer, heads, kv_heads, d_ffs, 1e-5)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, len(model.sizes))
    for name, tensor in model.state_dict().items():
        if name.startswith("rotary"):
            continue
        data = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            data = permute(data, len(data) // 16)
        write_tensor(writer, names.get_name(name, (".weight", ".bias")), data)
    finish(writer)
    return path


def _unequal(
    writer: gguf.GGUFWriter, heads: list[int], kv_heads: list[int], d_ffs: list[int], eps: float
) -> None:
    writer.add_context_length(128)
    writer.add_block_count(len(heads))
    writer.add_embedding_length(64)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_feed_forward_length(d_ffs)
    writer.add_layer_norm_rms_eps(eps)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    byte_vocabulary(writer)
