"""What is exported opens where people serve, and says the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from entasis.cli import main
from entasis.data import tokenizer
from entasis.errors import UserError
from entasis.interop.exporting import export
from entasis.interop.importing import import_model
from entasis.interop.transforms import ShapedWeights, find_widest, fold_scales, pad_layers
from entasis.model import weights
from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.shape import LayerShape, ModelShape

UNEQUAL = (LayerShape(4, 2, 64), LayerShape(2, 1, 96), LayerShape(6, 3, 32), LayerShape(2, 1, 128))
RAGGED = (LayerShape(4, 2, 64), LayerShape(3, 1, 0), LayerShape(0, 0, 96), LayerShape(5, 5, 32))
EQUAL = (LayerShape(6, 2, 64),) * 3
NARROW = (LayerShape(4, 2, 64),) * 3
SCALED = {"norm_scaling": True, "residual_scale": 0.7, "attention_scale": 1 / 16, "logit_scale": 0.5}
OLMO = {"qk_norm": "full", "norm_placement": "reordered"}
QWEN = {"qk_norm": "head", "tied_embeddings": True}
BIASED = {"qkv_bias": True, "ffn_bias": True}
GELU = {"norm": "layernorm", "norm_bias": True, "ffn": "gelu", "ffn_bias": True}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "llama": (EQUAL, {}),
    "llama-narrow": (NARROW, {}),
    "llama-unequal": (UNEQUAL, {}),
    "llama-scaled": (UNEQUAL, SCALED),
    "llama-ragged": (RAGGED, {"tied_embeddings": True}),
    "llama-biased": (UNEQUAL, BIASED),
    "llama-linear-rope": (UNEQUAL, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama-linear-rope-by-its-old-name": (UNEQUAL, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama-llama3-rope": (UNEQUAL, {"rope_scaling": LLAMA3}),
    "llama-llama3-rope-equal": (EQUAL, {"rope_scaling": LLAMA3}),
    "qwen3": (EQUAL, QWEN),
    "qwen3-unequal": (UNEQUAL, QWEN),
    "qwen3-scaled": (RAGGED, {**QWEN, **SCALED}),
    "olmo2": (EQUAL, OLMO),
    "olmo2-unequal": (UNEQUAL, OLMO),
    "olmo2-scaled": (UNEQUAL, {**OLMO, **SCALED}),
    "starcoder2": (EQUAL, GELU),
    "starcoder2-plain": (EQUAL, {"norm": "layernorm", "ffn": "gelu_tanh", "tied_embeddings": True}),
    "starcoder2-unequal": (UNEQUAL, GELU),
    "starcoder2-scaled": (RAGGED, {**GELU, **SCALED}),
    "starcoder2-head-bias": (EQUAL, {**GELU, "head_bias": True}),
}


@pytest.fixture(scope="module")
def trained():
    text = Path(json.__file__).read_text(encoding="utf-8")
    return tokenizer.train([text], 320)


def made(folder, trained, layers, changes):
    size = {"d_model": 96, "head_dim": 16, "vocabulary": 384, "context": 128, "norm_eps": 1e-6}
    model = Transformer(ModelShape(**{**size, "layers": layers, **changes}))
    init_weights(model, 0)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.mul_(3).add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    folder.mkdir()
    weights.save(model, folder)
    trained.save(folder / "tokenizer.json")
    return model.eval()


def ids(batch=2, length=30):
    return torch.randint(0, 320, (batch, length), generator=torch.Generator().manual_seed(1))


def padded_model(model):
    drawing = fold_scales(ShapedWeights(model.shape, {n: p.detach() for n, p in model.named_parameters()}))
    drawing = pad_layers(drawing, [find_widest(drawing.shape)] * drawing.shape.n_layers)
    wide = Transformer(drawing.shape).to(model.norm.weight.dtype)
    wide.load_state_dict(drawing.tensors)
    return wide


@pytest.mark.parametrize("case", CASES)
def test_folding_and_padding_are_exact_in_fp64(tmp_path, trained, case):
    model = made(tmp_path / "model", trained, *CASES[case]).double()
    wide = padded_model(model)
    assert wide.shape.uniform
    with torch.no_grad():
        torch.testing.assert_close(wide(ids()), model(ids()), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("case", "to"), [(c, to) for c in CASES for to in ("hf", "padded") if to == "hf" or "head-bias" not in c]
)
def test_transformers_gives_our_logits(tmp_path, trained, case, to):
    model = made(tmp_path / "model", trained, *CASES[case])
    answer = export(tmp_path / "model", tmp_path / "out", to=to)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=answer["remote_code"]
    ).eval()
    plain = to == "padded" or (model.shape.uniform and not model.shape.head_bias)
    assert answer["remote_code"] == (not plain)
    with torch.no_grad():
        if to == "padded" and "olmo2" in case:
            # A norm behind small branches magnifies rounding a thousandfold, so fp32 sums over other widths may
            # differ; that the padding itself is exact is shown in fp64 below.
            model = padded_model(model)
        torch.testing.assert_close(theirs(ids()).logits, model(ids()), atol=1e-5, rtol=1e-5)
    if to == "hf":
        assert sum(p.numel() for p in theirs.parameters()) >= answer["parameters"]
        if "ragged" not in case and "scaled" not in case and "biased" not in case:
            assert sum(p.numel() for p in theirs.parameters()) == answer["parameters"]
    text = "import json\n\ndef dumps("
    opened = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert opened(text, add_special_tokens=False)["input_ids"] == trained.encode(text)


def test_an_unequal_folder_works_as_a_transformers_model(tmp_path, trained):
    made(tmp_path / "model", trained, UNEQUAL, {})
    export(tmp_path / "model", tmp_path / "out", to="hf")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, device_map="cpu"
    ).eval()
    prompt = ids(1, 8)
    cached = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    uncached = model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=False, eos_token_id=None)
    assert torch.equal(cached, uncached)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, model(ids()).logits)
    model.train()
    plain = model(ids(), labels=ids()).loss
    plain.backward()
    expected = model.model.layers[2].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids(), labels=ids()).loss.backward()
    torch.testing.assert_close(model.model.layers[2].mlp.up_proj.weight.grad, expected)


def test_lora_trains_an_unequal_folder(tmp_path, trained):
    peft = pytest.importorskip("peft", reason="the extra lora is not installed")
    made(tmp_path / "model", trained, UNEQUAL, {})
    export(tmp_path / "model", tmp_path / "out", to="hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    rule = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = lora(ids(), labels=ids()).loss
        loss.backward()
        rule.step()
        rule.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


GGUF = {
    "llama": (EQUAL, {}, "llama"),
    "llama-scaled": (EQUAL, {**SCALED, "tied_embeddings": True}, "llama"),
    "deci": (UNEQUAL, {}, "deci"),
    "deci-narrow": (NARROW, {}, "deci"),
    "deci-ragged": (RAGGED, {"tied_embeddings": True}, "deci"),
    "deci-linear-rope": (UNEQUAL, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "deci"),
    "llama-linear-rope": (EQUAL, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "llama"),
    "qwen3": (EQUAL, QWEN, "qwen3"),
    "openelm": (UNEQUAL, QWEN, "openelm"),
    "openelm-scaled": (UNEQUAL, {**QWEN, **SCALED}, "openelm"),
    "olmo2": (EQUAL, OLMO, "olmo2"),
}


@pytest.mark.parametrize("case", GGUF)
def test_llama_cpp_gives_our_log_probabilities(tmp_path, trained, case):
    pytest.importorskip("xllamacpp", reason="llama.cpp's wheel xllamacpp is not installed")
    import judge_llama_cpp as llama_cpp

    layers, changes, arch = GGUF[case]
    model = made(tmp_path / "model", trained, layers, changes)
    answer = export(tmp_path / "model", tmp_path / "out", to="gguf")
    assert answer["architecture"] == arch
    # llama.cpp gives no log-probabilities of a token that is only part of a character.
    prompts = (ids(1, length) for length in range(30, 10, -1))
    with torch.no_grad():
        found = ((prompt, model(prompt)[0, -1].log_softmax(-1)) for prompt in prompts)
        prompt, ours = next((p, o) for p, o in found if "\ufffd" not in trained.decode([int(o.argmax())]))
    server = llama_cpp.open_server(tmp_path / "out" / answer["file"])
    theirs = llama_cpp.log_probabilities(server, prompt[0].tolist(), 5)
    assert len(theirs) == 5
    assert set(theirs) == set(ours.topk(5).indices.tolist())
    assert max(abs(ours[i].item() - value) for i, value in theirs.items()) < 5e-3
    text = "import json\n\n\ndef dumps(obj, *, indent=None):\n    return 12345"
    assert llama_cpp.n_tokens(server, text) == len(trained.encode(text))


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("case", ["deci", "openelm", "llama"])
def test_gguf_comes_back_through_import(tmp_path, trained, case, dtype):
    layers, changes, _ = GGUF[case]
    model = made(tmp_path / "model", trained, layers, changes)
    answer = export(tmp_path / "model", tmp_path / "out", to="gguf", dtype=dtype)
    import_model(tmp_path / "out" / answer["file"], tmp_path / "back", dtype="float32")
    back = weights.load(tmp_path / "back")
    assert back.shape.layers == model.shape.layers
    theirs = dict(back.named_parameters())
    for name, ours in model.named_parameters():
        # Half a unit in the last place; for q8_0 half a step, whose size is itself rounded to float16.
        step = 1.01 * ours.abs().max() / 127 / 2 if dtype == "q8_0" else 1e-7
        allowed = ours.abs() * (2**-8 if dtype == "bf16" else 2**-11) + step
        if ours.ndim == 1:
            allowed = torch.zeros(())
        assert ((theirs[name] - ours).abs() <= allowed).all(), name


@pytest.mark.parametrize(
    ("layers", "changes", "to", "says"),
    [
        (UNEQUAL, OLMO, "gguf", "--to hf and --to padded hold it"),
        (NARROW, OLMO, "gguf", "--to hf and --to padded hold it"),
        (UNEQUAL, {**QWEN, "tied_embeddings": False}, "gguf", "--to hf and --to padded hold it"),
        (EQUAL, BIASED, "gguf", "--to hf and --to padded hold it"),
        (EQUAL, {"norm": "layernorm"}, "hf", "RMSNorm"),
        (EQUAL, {"norm": "layernorm"}, "gguf", "no format here holds it"),
        (EQUAL, {"head_bias": True}, "gguf", "no format here holds it"),
        (UNEQUAL, {"qk_norm": "full"}, "gguf", "no format here holds it"),
        (EQUAL, {"qk_norm": "full"}, "padded", "no class there"),
        (EQUAL, {"head_bias": True}, "hf", "no bias there"),
        (EQUAL, {**GELU, "head_bias": True}, "padded", "no bias on its head"),
        (EQUAL, {**GELU, "head_bias": True}, "gguf", "--to hf holds it"),
        (EQUAL, {**GELU, "positions": "learned"}, "hf", "rotary positions"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_and_leaves_nothing(
    tmp_path, trained, layers, changes, to, says
):
    made(tmp_path / "model", trained, layers, changes)
    with pytest.raises(UserError, match=says):
        export(tmp_path / "model", tmp_path / "out", to=to)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_model_directly_under_the_root_is_part_of_no_study(tmp_path, trained, monkeypatch):
    made(tmp_path / "model", trained, EQUAL, {})
    monkeypatch.setattr(
        Path, "resolve", lambda self: Path("/model") if self.name == "model" else self.absolute()
    )
    export(tmp_path / "model", tmp_path / "out", to="hf")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("# model\n") and "## Study" not in card


def test_matrices_that_stay_in_f16_are_named(tmp_path, trained, capsys):
    made(tmp_path / "model", trained, (LayerShape(4, 2, 64), LayerShape(2, 1, 40)), {})
    command = ["export", str(tmp_path / "model"), "--to", "gguf", "--dtype", "q8_0"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    kept = ["blocks.1.feedforward.down.weight"]
    assert f"rows are no whole blocks of 32: {kept[0]}\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "entasis.json").read_text())["kept_in_f16"] == kept


def test_nothing_is_overwritten_and_the_card_tells_the_shape(tmp_path, trained):
    made(tmp_path / "model", trained, UNEQUAL, {})
    export(tmp_path / "model", tmp_path / "out", to="hf", dtype="bf16")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 3 | 2 | 1 | 128 |" in card
    with pytest.raises(UserError, match="exists"):
        export(tmp_path / "model", tmp_path / "out", to="hf")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(UserError, match=r"no shape\.json"):
        export(tmp_path / "model", tmp_path / "other", to="hf")
