"""Keyed permutations without a table: where position i of [0, n) goes, computed for any positions at once.

A Feistel network over a grid of a × b >= n cells, a and b near sqrt(n), with addition modulo a and b in place of
xor, so that the grid holds hardly more cells than positions; a result outside [0, n) is permuted again until it
falls inside ("cycle walking"). Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
"""

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = [(np.uint64(2 * i * _GOLDEN % 2**64), np.uint64((2 * i + 1) * _GOLDEN % 2**64)) for i in range(1, 5)]


def make_key(*parts: int | str) -> int:
    """A 64-bit key from numbers and words; equal parts give equal keys on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def make_keys(key: int, num_keys: int) -> Words:
    """Many keys from one: [num_keys]."""
    return _mix(np.uint64(key) ^ (np.arange(1, num_keys + 1, dtype=np.uint64) * np.uint64(_GOLDEN)))


def permute(positions: Ints, size: int | Ints, key: int | Words) -> Ints:
    """Where a keyed permutation of [0, size) sends each position.

    Args:
        positions: any positions, [n], each in [0, size).
        size: number of positions that are permuted, up to 2**62; one for all, or one for each, [n].
        key: picks the permutation; one for all, or one for each, [n].
    """
    cells = np.asarray(positions).astype(np.uint64)
    sizes = np.broadcast_to(np.asarray(size, dtype=np.uint64), cells.shape)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), cells.shape)
    num_rows = np.ceil(np.sqrt(sizes)).astype(np.uint64)
    num_columns = (sizes + num_rows - np.uint64(1)) // num_rows
    cells = _permute_grid(cells, num_rows, num_columns, keys)
    outside = np.flatnonzero(cells >= sizes)
    while outside.size:
        cells[outside] = _permute_grid(cells[outside], num_rows[outside], num_columns[outside], keys[outside])
        outside = outside[cells[outside] >= sizes[outside]]
    return cells.astype(np.int64)


def _permute_grid(cells: Words, num_rows: Words, num_columns: Words, keys: Words) -> Words:
    rows, columns = np.divmod(cells, num_columns)
    for for_rows, for_columns in _ROUNDS:
        rows = (rows + _below(_mix((columns ^ keys) + for_rows), num_rows)) % num_rows
        columns = (columns + _below(_mix((rows ^ keys) + for_columns), num_columns)) % num_columns
    return rows * num_columns + columns


def _below(words: Words, limit: Words) -> Words:
    """Random words scaled to [0, limit), limit <= 2**32."""
    return ((words >> np.uint64(32)) * limit) >> np.uint64(32)


def _mix(words: Words) -> Words:
    """The finaliser of splitmix64: every output bit depends on every input bit.

    Source: https://prng.di.unimi.it/splitmix64.c
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
