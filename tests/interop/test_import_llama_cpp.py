"""Imported GGUF files give llama.cpp's log-probabilities."""

from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch

from entasis.interop.importing import import_model
from entasis.model import weights

pytest.importorskip("xllamacpp", reason="llama.cpp's wheel xllamacpp is not installed")
import judge_llama_cpp as llama_cpp

IDS = tiny.tokens(batch=1, length=30)


def make(kind: str, path: Path) -> Path:
    if kind == "openelm":
        return tiny.gguf_openelm(path, tiny.openelm_weights())
    if kind == "deci":
        # llama.cpp leaves out the attention of a layer that has no FFN, so such a layer is not compared.
        return tiny.gguf_deci(path, tiny.DeciLM([x for x in tiny.DECI_LAYERS if x[2] or not x[0]]))
    if kind == "llama-q8_0":
        return tiny.gguf_of_hugging_face(path, "llama", tiny.hugging_face("llama"), "Q8_0")
    return tiny.gguf_of_hugging_face(path, kind, tiny.hugging_face(kind))


KINDS = [
    "llama", "llama-tied-biases", "llama-llama3-rope", "llama-linear-rope", "qwen2", "qwen3", "olmo2", "gpt2",
    "openelm", "deci", "llama-q8_0",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_equal_llama_cpp(kind, tmp_path):
    source = make(kind, tmp_path / "model.gguf")
    import_model(source, tmp_path / "out")
    with torch.no_grad():
        ours = weights.load(tmp_path / "out").eval()(IDS)[0, -1].float().log_softmax(-1)
    theirs = llama_cpp.log_probabilities(llama_cpp.open_server(source), IDS[0].tolist(), tiny.VOCABULARY)
    assert len(theirs) >= tiny.VOCABULARY - 5
    difference = max(abs(ours[i].item() - value) for i, value in theirs.items())
    # llama.cpp looks GELU up in a table of float16, and multiplies quantised weights by quantised activations.
    assert difference < {"gpt2": 2e-3, "llama-q8_0": 0.05}.get(kind, 2e-4), difference
