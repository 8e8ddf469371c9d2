"""The order of training: a pure function of (seed, position), so a seek is O(1) and nothing needs to be saved.

Each epoch visits every sequence once, in an order of its own: a keyed bijection of [0, count), computed and never
stored. It is a balanced Feistel network (Luby and Rackoff 1988, "How to construct pseudorandom permutations from
pseudorandom functions") over the next power of four, restricted to [0, count) by cycle walking: an output that falls
outside is put in again (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 3).
"""

from __future__ import annotations

import numpy as np

# Luby and Rackoff need four rounds of a good round function; two more cost little and allow for a small domain.
_ROUNDS = 6


class Order:
    """Which of `count` sequences is at each position; positions run on over the epochs (epoch = position // count)."""

    def __init__(self, count: int, seed: int):
        if count < 1:
            raise ValueError(f"count must be at least 1, found {count}")
        self.count = count
        self._seed = np.uint64(seed % 2**64)
        # Half of the bits that indices below `count` need, rounded up: the domain 4**half is less than 4 * count.
        self._half = max(1, ((count - 1).bit_length() + 1) // 2)

    def sample(self, position: int) -> int:
        """The sequence at one position."""
        return int(self.samples(np.array([position]))[0])

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """The sequences at many positions: int64, the shape of `positions` (1-D)."""
        epoch, offset = np.divmod(positions.astype(np.uint64), np.uint64(self.count))
        key = _mix(_mix(np.full_like(epoch, self._seed)) + epoch)
        index = self._permute(offset, key)
        # A cycle of the bijection that leaves from below count comes back there, after fewer than 4 rounds on average.
        while (outside := np.flatnonzero(index >= self.count)).size:
            index[outside] = self._permute(index[outside], key[outside])
        return index.astype(np.int64)

    def _permute(self, index: np.ndarray, key: np.ndarray) -> np.ndarray:
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = index >> half, index & mask
        for round_ in range(_ROUNDS):
            left, right = right, left ^ (_mix(_mix(key + np.uint64(round_)) ^ right) & mask)
        return (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64: one step and its finaliser (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
