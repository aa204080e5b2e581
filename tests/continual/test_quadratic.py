"""The quadratic program of GEM: the original's solutions, and what is true of the minimum alone."""

import numpy as np
import pytest

from dskd.continual.quadratic import minimise
from tests.continual.cases import CASES, GEM

RIDGE = 1e-3


def problem(memories_tD, gradient_D):
    """The P and q of GEM."""
    P_tt = memories_tD @ memories_tD.T
    return (P_tt + P_tt.T) / 2 + RIDGE * np.eye(len(P_tt)), memories_tD @ gradient_D


@pytest.mark.parametrize("name", GEM)
def test_golden_projections(name):
    case = CASES[name]["inputs"]
    memories_tD, gradient_D = np.array(case["G"]), np.array(case["g"])
    assert case["eps"] == RIDGE
    v_t = minimise(*problem(memories_tD, gradient_D), case["margin"])
    expected = CASES[name]["expected"]
    np.testing.assert_allclose(v_t, expected["v"], rtol=1e-12)
    projected_D = gradient_D + memories_tD.T @ v_t
    np.testing.assert_allclose(projected_D, expected["projected"], rtol=1e-12)
    np.testing.assert_allclose(memories_tD @ projected_D, expected["dots_after"], atol=1e-12)


def gradients(kind, t, seed):
    """Of t memories and a step: more entries than memories, fewer, or the same memory twice."""
    generator = np.random.default_rng([seed, t])
    entries = max(1, t // 3) if kind == "few entries" else t + 8
    memories_tD = generator.standard_normal((t, entries))
    if kind == "twins":
        memories_tD[t // 2 :] = memories_tD[: t - t // 2]
    return memories_tD, generator.standard_normal(entries)


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
@pytest.mark.parametrize("kind", ["many entries", "few entries", "twins"])
def test_no_entry_can_be_bettered(kind, scale, margin):
    """Karush, Kuhn and Tucker: the slope is 0 where v is free and does not fall where v is at its
    bound; as the problem is strictly convex, that is so at the minimum alone."""
    free = 0
    for t in range(1, 33):
        for seed in range(3):
            memories_tD, gradient_D = gradients(kind, t, seed)
            P_tt, q_t = problem(scale * memories_tD, scale * gradient_D)
            v_t = minimise(P_tt, q_t, margin)
            slope_t = P_tt @ v_t + q_t
            small = 1e-11 * max(np.abs(q_t + P_tt.sum(1) * margin).max(), 1e-300)
            assert v_t.min() >= margin
            assert slope_t.min() >= -small
            assert np.abs(slope_t[v_t > margin]).max(initial=0.0) <= small
            free += int((v_t > margin).sum())
    assert margin or free > 300  # of 1,584 numbers, or nothing was shown


def test_without_memories_there_is_nothing_to_add():
    assert minimise(np.zeros((0, 0)), np.zeros(0), 0.5).shape == (0,)
