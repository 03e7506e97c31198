"""Packing and bucketing of lengths: everything once, nothing too long, and rows that are nearly full."""

import numpy as np
import pytest

from kimi_mm.data.packing import best_fit, bucket


@pytest.mark.parametrize("pack", [best_fit, bucket])
@pytest.mark.parametrize("seed", range(4))
def test_every_item_is_in_one_row_that_holds_it(pack, seed):
    lengths = np.random.default_rng(seed).integers(1, 101, 300).tolist()
    rows = pack(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(300))
    for row in rows:
        sizes = [lengths[i] for i in row]
        assert (sum(sizes) if pack is best_fit else max(sizes) * len(sizes)) <= 100


def test_best_fit_takes_the_fullest_row_that_still_has_room():
    # 60 and 50 open rows; 40 fits both and goes to the fuller one, 50 to the other.
    assert best_fit([50, 60, 40, 50], 100) == [[1, 2], [0, 3]]
    assert best_fit([], 10) == []
    with pytest.raises(ValueError, match=r"\[1, 10\]"):
        best_fit([3, 11], 10)


def test_buckets_hold_like_lengths():
    rows = bucket([9, 1, 5, 2, 10, 5], 20)
    assert [sorted([9, 1, 5, 2, 10, 5][i] for i in row) for row in rows] == [[1, 2, 5, 5], [9, 10]]
