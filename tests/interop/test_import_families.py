"""Every family, imported, gives the logits of the code it comes from."""

import json
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch
from safetensors.torch import save_file

from entasis.errors import UserError
from entasis.interop.importing import import_model
from entasis.model import weights
from entasis.shape import layout

IDS = tiny.tokens()


@torch.no_grad()
def our_logits(folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    model = weights.load(folder).eval()
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == layout.sizes(model.shape)
    return model(ids)


@pytest.mark.parametrize("kind", tiny.CASES)
def test_hugging_face_family_gives_transformers_logits(kind, tmp_path):
    model = tiny.hugging_face(kind)
    model.save_pretrained(tmp_path / "source")
    result = import_model(tmp_path / "source", tmp_path / "out")
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert result.dtype == "float32"
    torch.testing.assert_close(our_logits(tmp_path / "out"), tiny.logits(model, IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [k for k in tiny.CASES if k != "gpt2-unscaled" and "starcoder2" not in k])
def test_gguf_gives_the_logits_of_the_model_it_was_made_from(kind, tmp_path):
    model = tiny.hugging_face(kind)
    source = tiny.gguf_of_hugging_face(tmp_path / "model.gguf", kind, model)
    import_model(source, tmp_path / "out")
    torch.testing.assert_close(our_logits(tmp_path / "out"), tiny.logits(model, IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", ["huggingface", "gguf"])
def test_openelm(form, tmp_path):
    w = tiny.openelm_weights()
    if form == "gguf":
        source = tiny.gguf_openelm(tmp_path / "model.gguf", w)
    else:
        source = tiny.save_folder(tmp_path / "source", tiny.OPENELM, w)
    result = import_model(source, tmp_path / "out")
    assert [(x.n_heads, x.n_kv_heads, x.d_ff) for x in result.shape.layers] == [
        (2, 1, 32), (4, 2, 80), (6, 3, 128),
    ]  # fmt: skip
    torch.testing.assert_close(our_logits(tmp_path / "out"), tiny.openelm_logits(w, IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", ["huggingface", "gguf"])
def test_decilm_with_layers_that_lack_a_part_or_both(form, tmp_path):
    model = tiny.DeciLM()
    if form == "gguf":
        source = tiny.gguf_deci(tmp_path / "model.gguf", model)
    else:
        state = {k: v for k, v in model.state_dict().items() if not k.startswith("rotary")}
        source = tiny.save_folder(tmp_path / "source", tiny.DECI, state)
    result = import_model(source, tmp_path / "out")
    assert result.shape.n_layers == 4
    assert "left out" in result.notes[0]
    torch.testing.assert_close(our_logits(tmp_path / "out"), model(IDS), atol=1e-4, rtol=0)


def test_quantised_and_half_precision_gguf(tmp_path):
    model = tiny.hugging_face("llama")
    expected = tiny.logits(model, IDS)
    for kind, dtype, tolerance in (
        ("Q8_0", "float32", 0.2),
        ("F16", "float16", 0.01),
        ("BF16", "bfloat16", 0.1),
    ):
        source = tiny.gguf_of_hugging_face(tmp_path / f"{kind}.gguf", "llama", model, kind)
        assert import_model(source, tmp_path / kind).dtype == dtype
        model_of = weights.load(tmp_path / kind, dtype=torch.float32).eval()
        with torch.no_grad():
            assert (model_of(IDS) - expected).abs().max() < tolerance
    assert import_model(source, tmp_path / "as16", dtype="bfloat16").dtype == "bfloat16"


def test_openelm_270m_has_the_published_heads_widths_and_count():
    """The numbers of apple/OpenELM-270M, from its config alone."""
    from entasis.interop.config_reader import ConfigReader
    from entasis.interop.hf_families import find_family

    multipliers = [round(0.5 + 3.5 * i / 15, 2) for i in range(16)]
    heads = [12] * 5 + [16] * 7 + [20] * 4
    config = {
        **tiny.OPENELM, "model_dim": 1280, "head_dim": 64, "num_transformer_layers": 16, "vocab_size": 32000,
        "num_query_heads": heads, "num_kv_heads": [h // 4 for h in heads], "ffn_multipliers": multipliers,
        "ffn_dim_divisor": 256, "max_context_length": 2048,
    }  # fmt: skip
    settings = ConfigReader(config, "config.json")
    shape = find_family(settings).read(settings, 200).shape
    assert (shape.layers[0].d_ff, shape.layers[-1].d_ff) == (768, 5120)
    count = sum(torch.Size(size).numel() for size in layout.sizes(shape).values())
    assert round(count / 1e6, 1) == 271.5


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("llama", {"model_type": "gemma2"}, "model_type is 'gemma2'"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "'yarn'"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'"),
        # transformers goes by rope_scaling where both are there.
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ("llama", {"is_causal": False}, "is_causal is False"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama", {"num_local_experts": 8}, "num_local_experts"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("mistral", {"sliding_window": 64}, "sliding_window is 64"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32}, "sliding_window is 32"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'"),
    ],
)
def test_what_models_here_do_not_do_is_refused_by_name(kind, changes, named, tmp_path):
    tiny.hugging_face(kind).save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError) as error:
        import_model(tmp_path / "source", tmp_path / "out")
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_sliding_window_as_long_as_the_context_changes_nothing(tmp_path):
    model = tiny.hugging_face("mistral", sliding_window=128)
    model.save_pretrained(tmp_path / "source")
    import_model(tmp_path / "source", tmp_path / "out")
    torch.testing.assert_close(our_logits(tmp_path / "out"), tiny.logits(model, IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_decilm_linear_replacements_are_refused(part, tmp_path):
    config = json.loads(json.dumps(tiny.DECI))
    config["block_configs"][1][part] = {"no_op": False, "replace_with_linear": True}
    state = {k: v for k, v in tiny.DeciLM().state_dict().items() if not k.startswith("rotary")}
    tiny.save_folder(tmp_path / "source", config, state)
    with pytest.raises(UserError, match=rf"block_configs\[1\]\.{part}: replace_with_linear is True"):
        import_model(tmp_path / "source", tmp_path / "out")


def test_old_style_config_and_sharded_index(tmp_path):
    """transformers 4 wrote rope_theta and rope_scaling apart; large models come in shards."""
    model = tiny.hugging_face("llama-llama3-rope")
    model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"], config["rope_scaling"] = rope.pop("rope_theta"), rope
    path.write_text(json.dumps(config))
    import_model(tmp_path / "source", tmp_path / "out")
    torch.testing.assert_close(our_logits(tmp_path / "out"), tiny.logits(model, IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_gpt2_as_openai_s_own_names_it(prefix, tmp_path):
    """Without the prefix, with the causal masks, and the tied head left out."""
    model = tiny.hugging_face("gpt2")
    model.save_pretrained(tmp_path / "source")
    tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    tensors |= {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 128, 128).tril() for i in range(3)}
    tensors = {prefix + k.removeprefix("transformer."): v.contiguous() for k, v in tensors.items()}
    save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    import_model(tmp_path / "source", tmp_path / "out")
    torch.testing.assert_close(our_logits(tmp_path / "out"), tiny.logits(model, IDS), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_memory_stays_at_the_largest_tensor(tmp_path):
    """An import in its own process, of a model of 24 equal matrices, holds a few of them, not all."""
    import subprocess
    import sys

    n, width = 12, 1024
    config = {
        **tiny.SAME, "model_type": "llama", "hidden_size": width, "intermediate_size": 2 * width,
        "head_dim": 64, "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": n,
    }  # fmt: skip
    from entasis.interop.config_reader import ConfigReader
    from entasis.interop.hf_families import find_family
    from entasis.interop.name_map import list_tensors

    settings = ConfigReader(config, "config.json")
    family = find_family(settings)
    stored = list_tensors(family.names, family.read(settings, 200).shape)
    tiny.save_folder(
        tmp_path / "source", config, {tensor.name: torch.zeros(tensor.size) for tensor in stored}
    )
    code = (
        "import resource, sys; from entasis.interop.importing import import_model\n"
        "import tokenizers, safetensors.torch\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "import_model(sys.argv[1], sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "source"), str(tmp_path / "out")]
    used = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024
    file = (tmp_path / "source" / "model.safetensors").stat().st_size / 2**20
    assert file > 450
    assert used < 100, f"{used} MB for a file of {file} MB whose largest tensor has 8 MB"
