"""Counter-based random numbers: against plain Python integers, and as a distribution."""

import numpy as np
import pytest

from dskd.data.counter import below, mix, uniform

BITS = 2**64 - 1


def reference(*parts: int) -> int:
    """The same hash with Python's unbounded integers."""
    state = 0
    for part in parts:
        z = ((state ^ (part & BITS)) + 0x9E3779B97F4A7C15) & BITS
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & BITS
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & BITS
        state = z ^ (z >> 31)
    return state


def test_first_output_of_splitmix64() -> None:
    # The published first number of SplitMix64 seeded with 0.
    assert int(mix(0)) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("parts", [(0,), (1, 2, 3), (2**63 - 1, 0), (-1, 5), (BITS, 7, 7, 7)])
def test_equals_plain_integers(parts: tuple[int, ...]) -> None:
    assert int(mix(*parts)) == reference(*parts)


def test_broadcasts_like_one_call_per_element() -> None:
    rows, places = np.array([3, 9, -4]), np.arange(5)
    got = mix(11, rows[:, None], places)
    assert got.dtype == np.uint64 and got.shape == (3, 5)
    assert got.tolist() == [[reference(11, int(r), int(p)) for p in places] for r in rows]


def test_uniform_is_uniform() -> None:
    x = uniform(5, np.arange(200_000))
    assert x.min() >= 0 and x.max() < 1
    assert abs(x.mean() - 0.5) < 4 * (1 / 12 / len(x)) ** 0.5  # 4 standard errors
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 4 / len(x) ** 0.5
    assert float(uniform(5, 17)) == (reference(5, 17) >> 11) / 2**53


def test_below_reaches_every_value_evenly() -> None:
    counts = np.bincount(below(7, 3, np.arange(70_000)), minlength=7)
    assert len(counts) == 7
    assert abs(counts - 10_000).max() < 5 * (10_000 * 6 / 7) ** 0.5


def test_floats_are_no_counters() -> None:
    with pytest.raises(AssertionError, match="integers"):
        mix(np.array([1.0]))
