"""Keyed permutations: each position once, the same on every machine, and as good as chance."""

from itertools import pairwise
from math import isqrt

import numpy as np
import pytest

from asr_train.data.permute import make_key, make_keys, permute

WORD = 2**64


def mix_by_hand(word):
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB % WORD
    return word ^ word >> 31


def permute_by_hand(position, size, key):
    """The same permutation in Python's own integers, a position at a time."""
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    while True:
        row, column = divmod(position, columns)
        for i in range(2, 10, 2):
            constant = i * 0x9E3779B97F4A7C15 % WORD
            row = (row + (mix_by_hand(((column ^ key) + constant) % WORD) >> 32) * rows // 2**32) % rows
            constant = (i + 1) * 0x9E3779B97F4A7C15 % WORD
            column = (column + (mix_by_hand(((row ^ key) + constant) % WORD) >> 32) * columns // 2**32) % columns
        position = row * columns + column
        if position < size:
            return position


def test_every_position_is_reached_once_for_every_size():
    for size in [*range(1, 400), 4096, 4097, 99_991]:
        assert np.array_equal(np.sort(permute(np.arange(size), size, make_key(size))), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 10, 17, 1000, 10**9, 2**40 + 3])
def test_equal_to_a_computation_without_numpy(size):
    positions = sorted({0, size // 3, size // 2, size - 1})
    for key in (0, 12345, WORD - 1):
        found = permute(np.array(positions), size, key).tolist()
        assert found == [permute_by_hand(position, size, key) for position in positions]


def test_sizes_and_keys_may_differ_from_position_to_position():
    sizes = np.array([5, 70, 70, 1000, 3])
    keys = make_keys(7, 5)
    positions = np.array([4, 0, 69, 500, 2])
    together = permute(positions, sizes, keys)
    alone = [permute(positions[i : i + 1], int(sizes[i]), keys[i : i + 1])[0] for i in range(5)]
    assert together.tolist() == alone


def permutations_of(size, num_keys):
    keys = make_keys(make_key("test", size), num_keys)
    return permute(np.tile(np.arange(size), num_keys), size, np.repeat(keys, size)).reshape(num_keys, size)


@pytest.mark.parametrize("size", [2, 3, 5, 8, 30])
def test_every_position_goes_everywhere_equally_often(size):
    num_keys = 6000
    found = permutations_of(size, num_keys)
    counts = np.stack([np.bincount(found[:, i], minlength=size) for i in range(size)])
    chi_square = ((counts - num_keys / size) ** 2 / (num_keys / size)).sum()
    freedom = (size - 1) ** 2
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 5


def test_nothing_of_the_old_order_is_left():
    size, num_keys = 1000, 300
    found = permutations_of(size, num_keys)
    # a random permutation has one fixed point and one successor kept on average, each with variance 1
    assert abs((found == np.arange(size)).sum(axis=1).mean() - 1) < 5 / np.sqrt(num_keys)
    assert abs((np.diff(found, axis=1) == 1).sum(axis=1).mean() - 1) < 5 / np.sqrt(num_keys)
    scaled = np.sqrt(size - 1)  # the correlation of random permutations has standard deviation 1 / sqrt(size - 1)
    with_order = [np.corrcoef(row, np.arange(size))[0, 1] * scaled for row in found]
    with_next_key = [np.corrcoef(row, other)[0, 1] * scaled for row, other in pairwise(found)]
    for correlations in (with_order, with_next_key):
        assert abs(np.mean(correlations)) < 5 / np.sqrt(num_keys)
        assert 0.8 < np.std(correlations) < 1.2


def test_keys_tell_their_parts_apart():
    keys = {make_key(*parts) for parts in [(1, 23), (12, 3), (123,), ("a", 1), (0, 0), (0, 0, 0), (-1, 0), (2**80,)]}
    assert len(keys) == 8
    assert len(set(make_keys(5, 10_000).tolist())) == 10_000
