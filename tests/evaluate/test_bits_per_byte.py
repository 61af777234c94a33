import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from entasis.data import tokenizer
from entasis.data.corpus import Corpus
from entasis.data.prepare import prepare
from entasis.errors import UserError
from entasis.evaluate.bits_per_byte import choose_documents, evaluate, interval
from entasis.model.initialisation import init_weights
from entasis.model.transformer import Transformer
from entasis.shape.shapes import LayerShape, ModelShape

MODULES = "antigravity bisect keyword linecache opcode stat struct this token tty".split()
SEQUENCE = 48


@pytest.fixture(autouse=True)
def one_thread():
    """The model is too small for more, and the machine may be busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    for name in MODULES:
        shutil.copy(Path(os.__file__).with_name(f"{name}.py"), folder / "text")
    prepare([folder / "text"], folder / "corpora", tokenizer="bytes", validation=0.3)
    return Corpus(folder / "corpora" / "train")


@pytest.fixture(scope="module")
def model(corpus) -> Transformer:
    layers = (LayerShape(2, 1, 32), LayerShape(1, 1, 48))
    model = Transformer(
        ModelShape(d_model=16, head_dim=8, vocabulary=corpus.vocabulary, context=SEQUENCE, layers=layers)
    )
    init_weights(model, 0)
    with torch.no_grad():
        # Far from the near-silence of initial weights, so that what is attended to matters.
        model.embedding.tokens.weight.mul_(50)
        for block in model.blocks:
            block.attention.value.weight.mul_(20)
            block.attention.output.weight.mul_(20)
    return model


def score(model, corpus, **changes):
    settings = {"sequence": SEQUENCE, "batch": 16, "device": torch.device("cpu")}
    return evaluate(model, corpus, **{**settings, **changes})


@torch.no_grad()
def test_every_token_is_predicted_once_from_what_precedes_it_in_its_window(model, corpus):
    stream = torch.from_numpy(corpus.read(0, corpus.tokens).astype(np.int64))
    inputs = torch.cat([torch.tensor([corpus.end_of_text]), stream[:-1]])
    expected = sum(
        F.cross_entropy(model(x[None])[0], y, reduction="sum").item()
        for x, y in zip(inputs.split(SEQUENCE), stream.split(SEQUENCE), strict=True)
    )
    result = score(model, corpus)
    assert result.nll_sum == pytest.approx(expected, rel=1e-6)
    assert result.tokens == corpus.tokens
    assert result.bytes == corpus.bytes
    assert result.bits_per_byte == pytest.approx(expected / corpus.bytes / math.log(2), rel=1e-6)


def test_a_model_that_knows_nothing_pays_log_v_for_every_token(model, corpus):
    silent = Transformer(model.shape)
    with torch.no_grad():
        for parameter in silent.parameters():
            parameter.zero_()
    result = score(silent, corpus)
    assert result.perplexity == pytest.approx(corpus.vocabulary)
    assert result.document_nll == pytest.approx(result.document_tokens * math.log(corpus.vocabulary))


def test_bytes_are_those_of_the_files(model, corpus):
    sizes = {Path(os.__file__).with_name(f"{name}.py").stat().st_size for name in MODULES}
    assert set(score(model, corpus).document_bytes.tolist()) <= sizes


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_batch_size_changes_nothing(model, corpus, batch):
    assert score(model, corpus, batch=batch).document_nll == pytest.approx(
        score(model, corpus).document_nll, rel=1e-6
    )


def test_shares_of_ranks_add_up(model, corpus):
    parts = [score(model, corpus, batch=4, rank=rank, world=3).document_nll for rank in range(3)]
    assert all(part.sum() > 0 for part in parts)
    assert sum(parts) == pytest.approx(score(model, corpus, batch=4).document_nll, rel=1e-6)


def test_a_limit_takes_whole_documents_the_same_ones_each_time(model, corpus):
    limit = corpus.tokens // 2
    chosen = choose_documents(corpus, limit)
    assert 0 < len(chosen) < corpus.documents
    assert (chosen == choose_documents(corpus, limit)).all()
    result = score(model, corpus, max_tokens=limit)
    assert result.tokens <= limit
    assert result.document_bytes.tolist() == corpus.document_bytes()[chosen].tolist()
    assert len(choose_documents(corpus, 1)) == 1
    assert len(choose_documents(corpus, None)) == corpus.documents


def test_masked_documents_do_not_see_each_other(model, tmp_path):
    (tmp_path / "text").mkdir()
    for name in ("struct", "token", "tty", "stat"):
        text = Path(os.__file__).with_name(f"{name}.py").read_text()
        (tmp_path / "text" / f"{name}.txt").write_text(text[:300])
    prepare([tmp_path / "text"], tmp_path / "corpora", tokenizer="bytes", validation=0.3)
    short = Corpus(tmp_path / "corpora" / "train")
    plain = score(model, short, sequence=short.tokens)
    masked = score(model, short, sequence=short.tokens, document_masking=True)
    # The first document has nothing before it that could be hidden; those after it have.
    assert masked.document_nll[0] == pytest.approx(plain.document_nll[0])
    assert (abs(masked.document_nll[1:] - plain.document_nll[1:]) > 1e-3).all()


def test_the_model_is_left_in_the_mode_it_was_in(model, corpus):
    model.train()
    score(model, corpus, max_tokens=100)
    assert model.training


RUSSIAN = (
    "Все счастливые семьи похожи друг на друга, <|endoftext|> каждая несчастлива по-своему: ы\ufffd 🙂. "
)


def with_byte_fallback() -> tokenizer.Tokenizer:
    """SentencePiece's kind, trained on English: Cyrillic letters are bytes, spaces stand before words."""
    tokens = [f"<0x{i:02X}>" for i in range(256)]
    library = Library(models.BPE(unk_token="<unk>", byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>", *tokens], show_progress=False
    )
    library.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    made = json.loads(library.to_str())
    made["added_tokens"] = made["added_tokens"][:2]  # the bytes are no special tokens
    return tokenizer.Tokenizer(Library.from_str(json.dumps(made)))


@pytest.mark.parametrize("kind", ["bytes", "byte fallback", "trained"])
def test_the_blocks_of_a_text_add_up_to_it_wherever_it_is_cut(tmp_path, kind):
    text = RUSSIAN * 60
    chosen = {
        "bytes": tokenizer.from_bytes,
        "byte fallback": with_byte_fallback,
        "trained": lambda: tokenizer.train([text], 300),
    }[kind]()
    chosen.save(tmp_path / "t.json")
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    prepare([tmp_path / "a.txt"], tmp_path / "c", tokenizer=tmp_path / "t.json", validation=0)
    corpus = Corpus(tmp_path / "c" / "train")
    silent = Transformer(
        ModelShape(
            d_model=16, head_dim=8, vocabulary=chosen.vocabulary, context=64, layers=(LayerShape(2, 1, 16),)
        )
    )
    with torch.no_grad():
        for parameter in silent.parameters():
            parameter.zero_()
    for most in (None, 1500, 1501, 1502, 1503):
        found = score(silent, corpus, tokenizer=chosen, max_tokens=most)
        written = chosen.decode(corpus.read(0, corpus.tokens if most is None else most))
        while not text.startswith(written):
            written = written[:-1]  # what is left of a cut character
        assert found.bytes == found.blocks.bytes == len((text if most is None else written).encode())
        # A byte costs the same everywhere, and the interval is about the estimate.
        low, high = interval(found.blocks)
        assert low < found.bits_per_byte < high
        assert found.blocks.bits_per_byte == pytest.approx(found.bits_per_byte)
        per_block = found.blocks.document_bytes[:-1] / found.blocks.document_tokens[:-1]
        assert per_block.std() < 0.1 * per_block.mean()
    if kind == "bytes":
        with pytest.raises(UserError, match="1 tokens end within the text's first character"):
            score(silent, corpus, tokenizer=chosen, max_tokens=1)
