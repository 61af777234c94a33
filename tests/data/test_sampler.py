"""The order is a permutation, computed, the same for any number of ranks."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from entasis.data.sampler import Sampler


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 10), st.integers(0, 3))
def test_every_epoch_is_a_permutation(n, seed, epoch):
    indices = Sampler(n, seed).indices(epoch * n, n)
    assert sorted(indices.tolist()) == list(range(n))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 500), st.integers(0, 2000), st.integers(0, 300), st.integers(0, 300))
def test_any_position_is_found_without_those_before_it(n, position, a, b):
    sampler = Sampler(n, 7)
    whole = sampler.indices(position, a + b)
    assert np.array_equal(
        whole, np.concatenate([sampler.indices(position, a), sampler.indices(position + a, b)])
    )


def test_epochs_and_seeds_differ_and_repeat():
    sampler = Sampler(1000, 1)
    first, second = sampler.indices(0, 1000), sampler.indices(1000, 1000)
    assert (first == second).mean() < 0.02
    assert (first == Sampler(1000, 2).indices(0, 1000)).mean() < 0.02
    assert np.array_equal(first, Sampler(1000, 1).indices(0, 1000))


def test_neighbours_are_scattered():
    indices = Sampler(100_000, 3).indices(0, 100_000)
    steps = np.abs(np.diff(indices))
    assert abs(np.corrcoef(indices[:-1], indices[1:])[0, 1]) < 0.02
    assert steps.mean() > 30_000  # a third of n, as for independent draws


def test_ranks_share_one_order_at_any_world_size():
    sampler, batch = Sampler(5000, 9), 16
    for step in range(50):
        whole = sampler.indices(step * batch, batch)
        for world in (1, 2, 4):
            share = batch // world
            parts = [sampler.indices(step * batch + rank * share, share) for rank in range(world)]
            assert np.array_equal(whole, np.concatenate(parts))


def test_a_thousand_million_windows_are_addressed_at_once():
    n = 10**9
    indices = Sampler(n, 0).indices(n - 500, 1000)
    assert indices.min() >= 0
    assert indices.max() < n
    assert len(set(indices[:500].tolist())) == len(set(indices[500:].tolist())) == 500
