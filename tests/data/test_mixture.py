"""A mixture gives every corpus its share at any point, the same at any world size, from one integer."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entasis.data.corpus import Corpus
from entasis.data.dataset import TokenDataset
from entasis.data.mixture import LONGEST_PERIOD, Mixture, Part, interleave, whole_shares
from entasis.data.mixture_rules import read, shares
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


def test_rules_weigh_by_tokens():
    tokens = [10_000, 100_000, 1_000_000]
    assert shares(read("proportional", "weights"), tokens) == [0.009, 0.0901, 0.9009]
    assert shares(read({"temperature": {"alpha": 1.0}}, "weights"), tokens) == [0.009, 0.0901, 0.9009]
    assert shares(read({"temperature": {"alpha": 0.0}}, "weights"), tokens) == [0.3333] * 3
    # 1 : 10^0.5 : 10
    assert shares(read({"temperature": {"alpha": 0.5}}, "weights"), tokens) == [0.0706, 0.2233, 0.7061]
    # None is left out, and they are few enough digits for a mixture.
    least = shares(read("proportional", "weights"), [1, 10**9])
    assert least == [0.0001, 1.0] and sum(whole_shares({"a": least[0], "b": least[1]}).values()) == 10_001


def mixture(weights: list[float], seed: int = 0) -> Mixture:
    return Mixture([Part(f"part {i}", Numbered(11 + i), w) for i, w in enumerate(weights)], seed)


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
    windows = whole.windows(position, count)
    assert (windows == np.concatenate([whole.windows(position + i, 1) for i in range(count)])).all()
    shares = np.array(weights) / sum(weights)
    assert (abs(np.array(whole.counts(position)) - shares * position) < 1).all()
    assert sum(whole.counts(position)) == position
    got = np.bincount(whole.batch(windows)[:, 0] - 11, minlength=len(weights))
    assert (np.array(whole.counts(position + count)) - whole.counts(position) == got).all()


@settings(deadline=None)
@given(WEIGHTS, st.sampled_from([0.9, 3, 0.25]), st.integers(0, 60))
def test_a_later_stage_goes_on_in_each_part_where_the_one_before_left_it(weights, other, done):
    """With other weights, which come at any time: no window comes twice before all of its part have come."""
    first, second = mixture(weights), mixture([*weights[:-1], other])
    second.begins = first.counts(done)
    rows = np.concatenate([first.batch(first.windows(0, done)), second.batch(second.windows(0, 40))])
    for n in range(11, 11 + len(weights)):
        own = rows[rows[:, 0] == n, 1]
        for start in range(0, len(own) // n * n, n):
            assert sorted(own[start : start + n]) == list(range(n))


@settings(deadline=None, max_examples=50)
@given(WEIGHTS, st.integers(0, 30), st.sampled_from([1, 2, 3, 4, 6]))
def test_ranks_read_slices_of_one_order(weights, step, world):
    whole, batch = mixture(weights), 12
    share = batch // world
    parts = [whole.windows(step * batch + rank * share, share) for rank in range(world)]
    assert (np.concatenate(parts) == whole.windows(step * batch, batch)).all()


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
    assert len(alone) == len(dataset) and (alone.windows(40, 16) == chosen).all()
    assert (alone.batch(chosen) == dataset.batch(chosen)).all()
    assert (alone.document_ids(chosen) == dataset.document_ids(chosen)).all()


def test_windows_come_from_the_corpora_that_are_named(corpus: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text("zzzz " * 4_000)
    prepare([tmp_path / "a.txt"], tmp_path / "o", tokenizer=corpus / "train", validation=0)
    other = TokenDataset(Corpus(tmp_path / "o" / "train"), 32)
    dataset = TokenDataset(Corpus(corpus / "train"), 32)
    both = Mixture([Part("prose", dataset, 0.75), Part("code", other, 0.25)], seed=1)
    rows, known = both.batch(both.windows(0, 64)), set(map(bytes, other.batch(np.arange(len(other)))))
    assert [bytes(row) in known for row in rows] == (both.windows(0, 64) >= len(dataset)).tolist()
    assert both.counts(64) == [48, 16] == [64 - sum(bytes(r) in known for r in rows), 16]
