"""The quadratic program of Gradient Episodic Memory, of as many numbers as there are memories.

Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory for Continual Learning", equation 11: which
multiples of earlier tasks' gradients are to be added to a step's gradient.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ZERO = 1e-12
"""A slope below this share of the largest entry of the problem counts as 0."""


def minimise(
    P_tt: NDArray[np.float64], q_t: NDArray[np.float64], margin: float
) -> NDArray[np.float64]:
    """The v [t] that minimises ``v P v / 2 + q v`` where no entry of v is below ``margin``.

    By active sets, as Lawson and Hanson (1974, chapter 23) find non-negative least squares: exact
    but for rounding, for t up to some tens.

    Args:
        P_tt: symmetric and positive definite, float64.
        q_t: float64.
        margin: the lower bound.
    """
    size = len(q_t)
    above_t = np.zeros(size)  # v - margin
    start_t = -(q_t + P_tt.sum(1) * margin)  # how steeply the function falls along v at margin
    free_t = np.zeros(size, bool)  # entries that are not at the bound
    largest = np.abs(start_t).max(initial=0.0)
    while True:
        descent_t = np.where(free_t, -np.inf, start_t - P_tt @ above_t)
        for entry in np.argsort(-descent_t, kind="stable").tolist():
            if descent_t[entry] <= _ZERO * largest:
                return above_t + margin
            free_t[entry] = True
            wanted_t = _unbounded(P_tt, start_t, free_t)
            if wanted_t[entry] > 0:
                break
            free_t[entry] = False  # its slope is rounding only: freed, it would return at once
        else:
            return above_t + margin
        while (below_t := free_t & (wanted_t <= 0)).any():
            # Go towards the unbounded minimum until the first entry is at its bound again.
            shares_t = above_t[below_t] / (above_t[below_t] - wanted_t[below_t])
            first = np.flatnonzero(below_t)[shares_t.argmin()]
            above_t += shares_t.min() * (wanted_t - above_t)
            free_t[first] = False
            free_t &= above_t > 0
            above_t[~free_t] = 0.0
            wanted_t = _unbounded(P_tt, start_t, free_t)
        above_t = wanted_t


def _unbounded(
    P_tt: NDArray[np.float64], start_t: NDArray[np.float64], free_t: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """The minimum over the free entries, the others at 0, whatever the bounds."""
    wanted_t = np.zeros_like(start_t)
    wanted_t[free_t] = np.linalg.solve(P_tt[np.ix_(free_t, free_t)], start_t[free_t])
    return wanted_t
