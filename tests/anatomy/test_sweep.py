"""The sweep gives what a naive loop gives, at half its cost, and goes on where it was stopped."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from small_models import SEQUENCE, Count, sentences, untrained

from entasis.anatomy import text as texts
from entasis.anatomy.diagnostics import ablation
from entasis.anatomy.layer_sweep import score_model
from entasis.data import tokenizer
from entasis.data.corpus import Corpus
from entasis.data.prepare import prepare
from entasis.errors import UserError
from entasis.evaluate.bits_per_byte import evaluate


def test_skipping_each_layer_equals_a_model_without_it(trained, make_subject) -> None:
    subject = make_subject(trained)
    found = ablation.skip.sweep(subject)
    for layer in range(subject.n_layers):
        short = torch.nn.ModuleList(b for i, b in enumerate(subject.model.blocks) if i != layer)
        whole, subject.model.blocks = subject.model.blocks, short
        np.testing.assert_allclose(found[layer], score_model(subject), rtol=1e-5)
        subject.model.blocks = whole
    np.testing.assert_allclose(found[-1], score_model(subject), rtol=1e-6)


def test_chosen_layers_alone(trained, make_subject) -> None:
    subject = make_subject(trained)
    whole = ablation.skip.sweep(subject)
    subject.only, count = frozenset([1, 3]), Count(subject.model)
    found = ablation.skip.sweep(subject)
    np.testing.assert_array_equal(found[[1, 3, -1]], whole[[1, 3, -1]])
    assert np.isnan(found[[0, 2, 4]]).all()
    L = subject.n_layers
    assert count.blocks == len(list(subject.batches())) * (L + (L - 2) + (L - 4))


def test_bf16_gives_nearly_the_same_differences(trained, make_subject) -> None:
    one, other = make_subject(trained), make_subject(trained)
    other.precision = "bf16"
    a, b = (ablation.skip.sweep(s).sum(1) / s.text.document_tokens.sum() for s in (one, other))
    assert (a != b).any()
    np.testing.assert_allclose(a[:-1] - a[-1], b[:-1] - b[-1], atol=0.02)


def test_half_an_ffn_is_one_of_half_the_width(trained, make_subject) -> None:
    subject = make_subject(trained)
    found = ablation.half_ffn.sweep(subject)
    ffn = subject.model.blocks[1].feedforward
    half = ffn.up.out_features // 2
    for linear in (ffn.gate, ffn.up):
        linear.weight = torch.nn.Parameter(linear.weight[:half])
    ffn.down.weight = torch.nn.Parameter(ffn.down.weight[:, :half])
    np.testing.assert_allclose(found[1], score_model(subject), rtol=1e-5)
    assert found[1].sum() > found[-1].sum()


def test_all_layers_cost_half_of_all_forward_passes(make_subject) -> None:
    from dataclasses import replace

    shape = replace(untrained().shape, layers=untrained().shape.layers[:1] * 24)
    subject = make_subject(untrained(shape))
    count, L = Count(subject.model), 24
    ablation.skip.sweep(subject)
    batches = len(list(subject.batches()))
    assert count.blocks == batches * (L + L * (L - 1) // 2)
    assert count.blocks <= 0.55 * batches * L * L


def test_a_stopped_sweep_goes_on(trained, make_subject, tmp_path: Path) -> None:
    whole = ablation.skip.sweep(make_subject(trained))
    subject = make_subject(trained)
    subject.folder = tmp_path
    assert len(list(subject.batches())) > 1

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    subject.progress = stop
    with pytest.raises(KeyboardInterrupt):
        ablation.skip.sweep(subject)
    subject.progress, count = lambda done, total: None, Count(subject.model)
    np.testing.assert_array_equal(ablation.skip.sweep(subject), whole)
    left = count.blocks
    np.testing.assert_array_equal(ablation.skip.sweep(subject), whole)
    batches = len(list(subject.batches()))
    assert left == (batches - 1) * 15 and count.blocks == left


def test_the_loss_is_that_of_evaluate(trained, make_subject, tmp_path: Path) -> None:
    for i, sentence in enumerate(sentences(30, 3)):
        (tmp_path / f"{i:02d}.txt").write_text(sentence)
    prepare([tmp_path], tmp_path / "corpus", tokenizer="bytes", validation=0)
    corpus = Corpus(tmp_path / "corpus" / "train")
    score = evaluate(trained.model, corpus, sequence=SEQUENCE, batch=4, device=torch.device("cpu"))
    # The texts' order is drawn, the corpus's not: contexts differ, sizes do not.
    text = texts.read(corpus.path, trained.tokenizer, tokens=100_000, sequence=SEQUENCE)
    assert text.tokens == score.tokens and text.document_bytes.sum() == score.bytes
    subject = make_subject(trained)
    subject.text = text
    assert score_model(subject).sum() == pytest.approx(score.nll_sum, rel=0.02)


def test_documents_are_cut_alike_and_their_ends_not_counted() -> None:
    long = [f"{i} " + "word " * 400 for i in range(10)]
    read = texts.read(long, tokenizer.from_bytes(), tokens=2000, sequence=64)
    assert 1800 <= read.tokens <= 2000
    sizes = read.document_tokens
    assert len(set(sizes)) == 1 and (read.document_bytes == sizes).all()  # a byte is a token
    ends = read.stream[1:] == 256
    assert (read.owner[ends] == -1).all() and (read.owner[~ends] >= 0).all()
    whole = texts.read(["ab", "c"], tokenizer.from_bytes(), tokens=2000, sequence=64)
    assert whole.tokens == 5 and (whole.owner >= 0).all()  # both ends are the documents' own


@pytest.mark.parametrize("n", range(1, 10))
def test_few_long_documents_are_all_read(n: int) -> None:
    read = texts.read(
        [f"{i} " + "word " * 4000 for i in range(n)], tokenizer.from_bytes(), tokens=2000, sequence=64
    )
    assert len(read.names) == n and 2000 - n < read.tokens <= 2000
    assert len(set(read.document_tokens)) == 1


@pytest.mark.parametrize("names", [("a-note", "book"), ("novel", "note")])
def test_a_note_beside_a_book(names: tuple[str, str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / f"{name}.txt").write_text("word " * (80 if "note" in name else 20_000))
    read = texts.read(tmp_path, tokenizer.from_bytes(), tokens=4000, sequence=64)
    assert read.tokens == 4000 and sorted(read.document_tokens) == [401, 3599]
    prepare([tmp_path], tmp_path / "corpus", tokenizer="bytes", validation=0)
    again = texts.read(tmp_path / "corpus" / "train", None, tokens=4000, sequence=64)
    assert again.tokens == 4000 and sorted(again.document_tokens) == [401, 3599]


def test_of_many_documents_a_fair_share_is_read() -> None:
    """What earlier versions read of them, so that what was measured with one can be compared."""
    many = [f"{i} " + "word " * (20 + i % 40) for i in range(100)]
    read = texts.read(many, tokenizer.from_bytes(), tokens=12_000, sequence=64)
    assert (read.tokens, read.fingerprint) == (11_828, "c9a5e1d7ea41999bca1acec6cd43eee8")


def test_every_target_is_in_one_batch(make_subject, trained) -> None:
    subject = make_subject(trained)
    stream = torch.cat([b.tokens_BT.flatten() for b in subject.batches()])
    assert stream.tolist() == subject.text.stream[:-1].tolist()
    owners = np.concatenate([b.owner_N for b in subject.batches()])
    assert owners.tolist() == subject.text.owner[subject.text.owner >= 0].tolist()


def test_text_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        texts.read(tmp_path / "none.txt", tokenizer.from_bytes(), tokens=10, sequence=8)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="no text"):
        texts.read(tmp_path / "empty.txt", tokenizer.from_bytes(), tokens=10, sequence=8)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        texts.read(tmp_path / "empty.txt", None, tokens=10, sequence=8)
