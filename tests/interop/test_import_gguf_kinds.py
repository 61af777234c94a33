"""GGUF files in several parts, and SentencePiece tokenizers, against gguf-py's writer and llama.cpp."""

import shutil
from pathlib import Path

import gguf
import pytest
import tiny_checkpoints as tiny
import torch
from tokenizers.implementations import SentencePieceBPETokenizer

from entasis.data import tokenizer as tokenizers
from entasis.errors import UserError
from entasis.evaluate.loading import load
from entasis.interop.importing import import_model
from entasis.model import weights

IDS = tiny.tokens(batch=1, length=30)


@pytest.fixture
def parts(tmp_path):
    model = tiny.hugging_face("llama")
    tiny.gguf_of_hugging_face(tmp_path / "model.gguf", "llama", model, tensors_a_part=7)
    return model, sorted(tmp_path.glob("model-*.gguf"))


@torch.no_grad()
def test_a_split_file_is_one_model(parts, tmp_path):
    model, files = parts
    assert len(files) > 2
    import_model(files[0], tmp_path / "out")
    torch.testing.assert_close(
        weights.load(tmp_path / "out").eval()(IDS), tiny.logits(model, IDS), atol=1e-4, rtol=0
    )
    assert (tmp_path / "out" / "provenance.json").read_text().count("sha256") == len(files) + 1


def test_parts_that_are_missing_renamed_or_named_first(parts, tmp_path):
    _, files = parts
    with pytest.raises(UserError, match="name the first part"):
        import_model(files[1], tmp_path / "out")
    files[1].rename(tmp_path / "aside")
    with pytest.raises(UserError, match=f"{files[1].name}: is missing"):
        import_model(files[0], tmp_path / "out")
    shutil.copy(files[2], files[1])
    with pytest.raises(UserError, match="says it is part 2"):
        import_model(files[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


TEXT = "The keeper climbed the stairs slowly, one hand on the rail; he knew each step by its sound. " * 3
TEXTS = [
    TEXT,
    " two  spaces and\ta tab\n\nand lines ",
    "naïve café, 深い海, 🜁 and bytes",
    "the the thethe climbed",
    "a",
]


@pytest.mark.parametrize("prefix", [True, False])
@torch.no_grad()
def test_a_sentencepiece_tokenizer_reads_text_as_llama_cpp_does(prefix, tmp_path):
    llama_cpp = pytest.importorskip("judge_llama_cpp", reason="llama.cpp's wheel xllamacpp is not installed")
    trained = SentencePieceBPETokenizer()
    trained.train_from_iterator([TEXT], vocab_size=300, special_tokens=[], show_progress=False)
    pieces = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *(p for p, _ in pieces)]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]

    def vocabulary(writer: gguf.GGUFWriter, n: int) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores([float(-i) for i in range(len(tokens))])
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(3)
        writer.add_unk_token_id(0)
        writer.add_add_bos_token(False)
        writer.add_add_space_prefix(prefix)

    model = tiny.hugging_face("llama", vocab_size=len(tokens))
    model.lm_head.weight.data[:259] = (
        0  # llama.cpp tells no probabilities where a piece that ends a text wins
    )
    source = tiny.gguf_of_hugging_face(
        tmp_path / "model.gguf", "llama", model, n_tokens=len(tokens), write_vocabulary=vocabulary
    )
    import_model(source, tmp_path / "out")
    read = tokenizers.load(tmp_path / "out" / "tokenizer.json")
    ours = weights.load(tmp_path / "out").eval()
    server = llama_cpp.open_server(source)
    for text in TEXTS:
        ids = read.encode(text)
        assert read.decode(ids) == text
        assert len(ids) == llama_cpp.n_tokens(server, text)
        # The same probabilities after the text: the same ids in the same places.
        theirs = llama_cpp.log_probabilities(server, text, 20)
        mine = ours(torch.tensor([ids]))[0, -1].float().log_softmax(-1)
        assert max(abs(mine[i].item() - value) for i, value in theirs.items()) < 2e-4
    assert read.end_of_text == 2
    assert load(tmp_path / "out").stop == {2, 3}


def test_pieces_without_scores(tmp_path):
    def vocabulary(writer: gguf.GGUFWriter, n: int) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([chr(0x100 + i) for i in range(n)])

    source = tiny.gguf_of_hugging_face(
        tmp_path / "m.gguf", "llama", tiny.hugging_face("llama"), write_vocabulary=vocabulary
    )
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.scores"):
        import_model(source, tmp_path / "out")


def test_the_hub_by_name_says_when_it_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="hf:nobody/nothing: cannot be fetched"):
        import_model("hf:nobody/nothing", tmp_path / "out")
    assert not Path(tmp_path / "out").exists()
