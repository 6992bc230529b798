"""Completion: good estimates for what was not probed, and never a number for what does not answer."""

from __future__ import annotations

import numpy as np

from crossedge.sched.completion import completed
from crossedge.sched.coordinates import fit
from crossedge.sched.matrix import State, restricted, sampled_peers, symmetrised
from tests.sched_worlds import regions


def test_hidden_pairs_are_estimated_well_and_measured_ones_are_kept() -> None:
    matrix, _ = regions((30, 25, 15), seed=5)
    probed = restricted(matrix, sampled_peers(matrix.size, 12, np.random.default_rng(1)))
    result = completed(probed, np.random.default_rng(2))
    assert result.estimator == min(result.errors, key=lambda name: result.errors[name])
    hidden = result.matrix.state == State.ESTIMATED
    assert hidden.any()
    error = np.abs(result.matrix.rtt - matrix.rtt)[hidden] / matrix.rtt[hidden]
    assert np.median(error) < 0.1
    assert (result.matrix.rtt[probed.measured] == matrix.rtt[probed.measured]).all()
    assert (result.matrix.confidence[hidden] < 1.0).all()
    assert (result.matrix.confidence[hidden] > 0.0).all()
    assert np.allclose(result.matrix.rtt, result.matrix.rtt.T)


def test_same_seed_gives_the_same_matrix() -> None:
    matrix, _ = regions((20, 20), seed=6)
    probed = restricted(matrix, sampled_peers(matrix.size, 8, np.random.default_rng(1)))
    one, two = (completed(probed, np.random.default_rng(3)).matrix.rtt for _ in range(2))
    assert (one == two).all()


def test_pairs_of_unreachable_nodes_are_never_invented() -> None:
    matrix, _ = regions((30, 30), seed=7)
    dead = [3, 17, 40, 41, 55]
    probed = sampled_peers(matrix.size, 10, np.random.default_rng(1))
    silent = np.zeros_like(probed)
    silent[dead], silent[:, dead] = probed[dead], probed[:, dead]
    rtt = np.where(probed & ~silent, matrix.rtt, np.nan)
    result = completed(symmetrised(matrix.names, rtt, silent), np.random.default_rng(2), "regional")
    known = result.matrix.known
    np.fill_diagonal(known, False)
    assert not known[dead].any()
    assert sorted(result.lone) == dead
    alive = np.setdiff1d(np.arange(60), dead)
    assert result.matrix.known[np.ix_(alive, alive)].all()


def test_one_silent_pair_stays_unreachable_between_nodes_that_answer_others() -> None:
    matrix, _ = regions((15, 15), seed=8)
    silent = np.zeros((30, 30), dtype=bool)
    silent[2, 20] = True
    rtt = np.where(silent | silent.T, np.nan, matrix.rtt)
    rtt[5, 6] = rtt[6, 5] = np.nan
    result = completed(symmetrised(matrix.names, rtt, silent), np.random.default_rng(0), "regional").matrix
    assert result.state[2, 20] == State.UNREACHABLE
    assert np.isnan(result.rtt[2, 20])
    assert result.state[5, 6] == State.ESTIMATED


def test_nothing_is_estimated_across_a_partition() -> None:
    matrix, region = regions((12, 12), seed=9)
    rtt = np.where(region[:, None] == region[None, :], matrix.rtt, np.nan)
    result = completed(symmetrised(matrix.names, rtt), np.random.default_rng(0), "coordinates").matrix
    assert not result.known[:12, 12:].any()


def test_coordinates_rebuild_a_geometry_with_heights() -> None:
    rng = np.random.default_rng(4)
    points, heights = rng.normal(0, 50, (60, 3)), rng.exponential(5.0, 60)
    rows, columns = np.nonzero(np.triu(sampled_peers(60, 14, rng), 1))
    rtt = np.linalg.norm(points[rows] - points[columns], axis=1) + heights[rows] + heights[columns]
    found = fit(60, rows, columns, rtt, rng)
    assert (
        np.median(np.abs(found.between(rows, columns) - rtt) / rtt) < 0.08
    )  # the fit is robust, so it is not exact
    assert (found.heights >= 0).all()
    every = np.arange(60)
    assert np.allclose(found.block(every, every)[rows, columns], found.between(rows, columns))
