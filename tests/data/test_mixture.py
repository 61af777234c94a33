"""A mixture gives every corpus its share at any point, the same at any world size, from one integer."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entasis.data.corpus import Corpus
from entasis.data.dataset import TokenDataset
from entasis.data.mixture import LONGEST_PERIOD, Mixture, Part, interleave, whole_shares
from entasis.data.prepare import prepare
from entasis.errors import UserError

COUNTS = st.lists(st.integers(1, 60), min_size=1, max_size=7)
WEIGHTS = st.lists(st.sampled_from([0.7, 0.3, 0.05, 1, 2, 1.5, 0.125]), min_size=1, max_size=3)


class Numbered(TokenDataset):
    """Windows that say their number, instead of a corpus on disk."""

    def __init__(self, n: int) -> None:
        self.n, self.sequence = n, 1

    def __len__(self) -> int:
        return self.n

    def batch(self, indices: np.ndarray) -> np.ndarray:
        return np.stack([np.full(len(indices), self.n), indices], axis=1)


def mixture(weights: list[float], seed: int = 0, begin: int = 0) -> Mixture:
    result = Mixture([Part(f"part {i}", Numbered(11 + i), w) for i, w in enumerate(weights)], seed)
    result.begins = [begin] * len(weights)
    return result


@settings(deadline=None)
@given(COUNTS, st.data())
def test_every_prefix_has_every_share_to_less_than_one_window(counts, data):
    first = data.draw(st.permutations(range(len(counts))))
    period = interleave(counts, first)
    assert np.bincount(period, minlength=len(counts)).tolist() == counts
    given_PK = np.cumsum(period[:, None] == np.arange(len(counts)), axis=0)
    wanted_PK = np.arange(1, len(period) + 1)[:, None] * np.array(counts)  # times the period
    assert (abs(given_PK * len(period) - wanted_PK) < len(period)).all()


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 500), st.integers(1, 40), st.integers(0, 3))
def test_counts_and_windows_follow_from_one_integer(weights, position, count, seed):
    """However the windows are asked for, they are the same ones, and each part is read in its own order."""
    whole = mixture(weights, seed)
    rows = whole.batch(position, count)
    assert (rows == np.concatenate([whole.batch(position + i, 1) for i in range(count)])).all()
    assert (whole.sources(position, count) == rows[:, 0] - 11).all()
    shares = np.array(weights) / sum(weights)
    assert (abs(np.array(whole.counts(position)) - shares * position) < 1).all()
    assert sum(whole.counts(position)) == position
    # What was read before a stage begins moves each part alone.
    later = mixture(weights, seed, begin=5)
    for a, b in zip(whole.indices(0, 200), later.indices(0, 30), strict=True):
        assert (a[5 : 5 + len(b)] == b[: len(a[5:])]).all()


@settings(deadline=None, max_examples=50)
@given(WEIGHTS, st.integers(0, 30), st.sampled_from([1, 2, 3, 4, 6]))
def test_ranks_read_slices_of_one_order(weights, step, world):
    whole, batch = mixture(weights), 12
    share = batch // world
    parts = [whole.batch(step * batch + rank * share, share) for rank in range(world)]
    assert (np.concatenate(parts) == whole.batch(step * batch, batch)).all()


def test_an_epoch_of_each_part_has_every_window_once():
    whole = mixture([0.7, 0.3])
    rows = whole.batch(0, 100)
    for n in (11, 12):
        own = rows[rows[:, 0] == n, 1]
        for epoch in range(len(own) // n):
            assert sorted(own[epoch * n : epoch * n + n]) == list(range(n))


def test_weights_are_taken_as_they_are_written():
    assert whole_shares({"a": 0.7, "b": 0.3}) == {"a": 7, "b": 3}
    assert whole_shares({"a": 1, "b": 1, "c": 1}) == {"a": 1, "b": 1, "c": 1}
    assert whole_shares({"a": 1e-3, "b": 0.999}) == {"a": 1, "b": 999}
    with pytest.raises(
        UserError, match=f"add up to 1,000,000; give them fewer digits .at most {LONGEST_PERIOD:,}"
    ):
        whole_shares({"a": 0.123457, "b": 0.876543})


def test_one_corpus_alone_is_read_as_ever(corpus: Path):
    from entasis.data.sampler import Sampler

    dataset = TokenDataset(Corpus(corpus / "train"), 32)
    alone = Mixture([Part("train", dataset)], seed=5)
    alone.begins = [3]
    chosen = Sampler(len(dataset), 5).indices(3 + 40, 16)
    assert (alone.batch(40, 16) == dataset.batch(chosen)).all()
    assert (alone.document_ids(40, 16) == dataset.document_ids(chosen)).all()


def test_windows_come_from_the_corpora_that_are_named(corpus: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text("zzzz " * 4_000)
    prepare([tmp_path / "a.txt"], tmp_path / "o", tokenizer=corpus / "train", validation=0)
    other = TokenDataset(Corpus(tmp_path / "o" / "train"), 32)
    dataset = TokenDataset(Corpus(corpus / "train"), 32)
    both = Mixture([Part("prose", dataset, 0.75), Part("code", other, 0.25)], seed=1)
    rows, known = both.batch(0, 64), set(map(bytes, other.batch(np.arange(len(other)))))
    assert [bytes(row) in known for row in rows] == (both.sources(0, 64) == 1).tolist()
    assert both.counts(64) == [48, 16]
