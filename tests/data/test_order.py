import time

import numpy as np
import pytest

from bigtrain.data.order import Order

COUNTS = [*range(1, 201), 255, 256, 257, 1000, 1009, 4096, 7919, 65537]


@pytest.mark.parametrize("count", COUNTS)
def test_every_epoch_visits_every_sequence_once(count):
    seen = Order(count, seed=3).samples(np.arange(3 * count)).reshape(3, count)
    assert (np.sort(seen) == np.arange(count)).all()


def test_one_position_is_the_same_as_many():
    order = Order(1009, seed=5)
    positions = np.array([0, 1, 1008, 1009, 5000, 2**40])
    assert [order.sample(int(p)) for p in positions] == order.samples(positions).tolist()


def test_seeds_and_epochs_differ():
    first = Order(1000, 0).samples(np.arange(2000))
    assert (first[:1000] == first[1000:]).sum() < 10  # two random orders agree in one place on average
    assert (first[:1000] == Order(1000, 1).samples(np.arange(1000))).sum() < 10
    # Epochs of one seed must not be those of the next: sums of seed and epoch would do that.
    assert (first[1000:] == Order(1000, 1).samples(np.arange(1000))).sum() < 10


@pytest.mark.parametrize("count", [7, 16, 100])
def test_every_sequence_is_as_likely_at_every_place(count):
    """Chi-square of the sequence at each place of 200 * count epochs, against uniform."""
    epochs = 200 * count
    seen = Order(count, seed=11).samples(np.arange(epochs * count)).reshape(epochs, count)
    for place in {0, 1, count // 2, count - 1}:
        chi2 = ((np.bincount(seen[:, place], minlength=count) - 200) ** 2 / 200).sum()
        freedom = count - 1
        assert chi2 < freedom + 5 * np.sqrt(2 * freedom), (place, chi2)


def test_neighbours_are_not_kept_together():
    """Steps from one place to the next are spread as those of a random permutation: few are of length one."""
    steps = np.diff(Order(100_000, seed=1).samples(np.arange(100_000)))
    assert (np.abs(steps) == 1).sum() < 12  # 2 are expected
    assert abs(np.abs(steps).mean() / 100_000 - 1 / 3) < 0.005


def test_the_order_never_changes():
    assert Order(10, 7).samples(np.arange(12)).tolist() == [9, 2, 3, 5, 1, 6, 7, 4, 0, 8, 3, 8]
    assert Order(123_456_789_012, 42).samples(np.array([0, 1, 2**50])).tolist() == [51252312675, 43205249631, 117350897306]


def test_it_is_fast():
    order = Order(3_000_000_019, seed=0)
    begin = time.perf_counter()
    order.samples(np.arange(1_000_000))
    assert time.perf_counter() - begin < 2


def test_no_sequences_are_refused():
    with pytest.raises(ValueError, match="at least 1, found 0"):
        Order(0, 0)
