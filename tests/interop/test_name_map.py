"""One map for each family: what export joins, import splits back to the bit."""

import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_export import OLMO, QWEN, RAGGED, UNEQUAL, made, trained  # noqa: F401  (trained is a fixture)

from entasis.cli import main
from entasis.errors import UserError
from entasis.interop import hf_unequal  # noqa: F401  (registers its families)
from entasis.interop.gguf_families import ARCHITECTURES
from entasis.interop.hf_families import FAMILIES
from entasis.interop.name_map import check, list_tensors
from entasis.model import weights
from entasis.shape import LayerShape, ModelShape, ffn_kinds, layout

MAPS = {
    **{f"hf-{name}": family.names for name, family in FAMILIES.items()},
    **{f"gguf-{name}": architecture.names for name, architecture in ARCHITECTURES.items()},
}


@st.composite
def shapes(draw, names):
    """A shape whose every module the family has a name for."""
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        groups = draw(st.integers(0, 3))
        d_ff = draw(st.integers(0 if groups else 1, 5))
        layers.append(LayerShape(groups * draw(st.integers(1, 3)), groups, d_ff))
    bias = {
        field: draw(st.booleans()) for field in ("qkv_bias", "attention_output_bias", "ffn_bias", "head_bias")
    }
    norm = "layernorm" if draw(st.booleans()) else "rmsnorm"
    return ModelShape(
        d_model=draw(st.integers(1, 7)),
        head_dim=2 * draw(st.integers(1, 3)),
        vocabulary=draw(st.integers(1, 9)),
        layers=tuple(layers),
        norm=norm,
        norm_bias=norm == "layernorm" and draw(st.booleans()),
        ffn="swiglu" if "feedforward.gate" in names.block else "gelu",
        qk_norm=draw(st.sampled_from(["none", "head", "full"])) if "attention.query_norm" in names.block else "none",
        positions="learned" if "embedding.positions" in names.outer and draw(st.booleans()) else "rope",
        tied_embeddings=draw(st.booleans()),
        context=5,
        **bias,
    )  # fmt: skip


@pytest.mark.parametrize("family", MAPS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_import_splits_what_export_joins(family, data):
    names = MAPS[family]
    shape = data.draw(shapes(names))
    theirs_of_ours = tuple(data.draw(st.permutations(range(2 * shape.n_layers))))[: shape.n_layers]
    stored = list_tensors(names, shape, theirs_of_ours)
    ours = {name: torch.randn(size) for name, size in layout.sizes(shape).items()}
    theirs = {tensor.name: tensor.join(ours) for tensor in stored}
    assert len(theirs) == len(stored)
    check(stored, {name: tuple(tensor.shape) for name, tensor in theirs.items()}, "here", names.ignored)
    back = {name: part for tensor in stored for name, part in tensor.split(theirs[tensor.name])}
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    again = {tensor.name: tensor.join(back) for tensor in stored}
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


def test_a_parameter_without_a_name_is_refused():
    layer = LayerShape(2, 1, 4)
    shape = ModelShape(d_model=4, head_dim=2, vocabulary=3, layers=(layer,), positions="learned")
    with pytest.raises(UserError, match=r"embedding\.positions\.weight has no name"):
        list_tensors(FAMILIES["llama"].names, shape)
    kind = ffn_kinds.FFNKind("odd", matrices=(("mix", ("residual", "residual")),), kept=lambda sizes: 0)
    with mock.patch.dict(ffn_kinds.KINDS, {"odd": kind}):
        shape = ModelShape(d_model=4, head_dim=2, vocabulary=3, layers=(layer,), ffn="odd")
        with pytest.raises(UserError, match=r"blocks\.0\.feedforward\.mix\.weight has no name"):
            list_tensors(FAMILIES["llama"].names, shape)


@pytest.mark.parametrize(
    ("architecture", "layers", "changes"),
    [
        ("llama", (LayerShape(6, 2, 64),) * 3, {}),
        ("deci", UNEQUAL, {"tied_embeddings": True}),
        ("qwen3", (LayerShape(4, 2, 64),) * 3, QWEN),
        ("openelm", UNEQUAL, QWEN),
        ("olmo2", (LayerShape(6, 2, 64),) * 3, OLMO),
    ],
)
def test_a_gguf_file_comes_back_bit_for_bit(tmp_path, trained, architecture, layers, changes, capsys):  # noqa: F811
    model = made(tmp_path / "model", trained, layers, changes)
    assert main(["export", str(tmp_path / "model"), "--to", "gguf", "--output", str(tmp_path / "out")]) == 0
    assert f"arch {architecture}," in capsys.readouterr().out
    assert main(["import", str(tmp_path / "out" / "model-f32.gguf"), str(tmp_path / "back")]) == 0
    back = weights.load(tmp_path / "back")
    assert back.shape.layers == model.shape.layers
    theirs = dict(back.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("to", "says"), [("guff", "did you mean gguf?"), ("onnx", "choose one of hf, padded, gguf")]
)
def test_an_unknown_format_is_answered_with_the_nearest(tmp_path, trained, to, says, capsys):  # noqa: F811
    made(tmp_path / "model", trained, RAGGED, {})
    assert main(["export", str(tmp_path / "model"), "--to", to, "--output", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err


def test_hugging_face_folders_go_both_ways_without_gguf(tmp_path, trained):  # noqa: F811
    made(tmp_path / "model", trained, UNEQUAL, {})
    code = (
        "import sys; sys.modules['gguf'] = None; from entasis.cli import main\n"
        "sys.exit(main(['export', 'model', '--to', 'hf', '--output', 'out']) or main(['import', 'out', 'back']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
