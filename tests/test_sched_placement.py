"""Placement: optima that can be enumerated, bounds never above them, capacities kept, moves for a gain."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from crossedge.sched.capacities import assign
from crossedge.sched.decision import Policy, decide, explain
from crossedge.sched.files import read_matrix
from crossedge.sched.placement import PlacementError, Problem, mean_of, place
from tests.sched_worlds import brute_force, noisy, regions

DATA = os.environ.get("CROSSEDGE_DATA")


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_small_problems_are_solved_and_bounded_exactly(replicas: int, seed: int) -> None:
    matrix, _ = regions((6, 5, 4), seed=seed)
    weights = np.random.default_rng(seed).exponential(3.0, 15)
    result = place(Problem(matrix.rtt, weights, replicas), rng())
    optimum = brute_force(matrix.rtt, weights, replicas)
    assert result.mean_ms == pytest.approx(optimum)
    assert result.bound_ms <= optimum * (1 + 1e-9)
    assert result.gap <= 0.01
    assert result.flow.sum() == pytest.approx(weights.sum())


def optimal_flow(rtt: np.ndarray, weights: np.ndarray, capacities: np.ndarray) -> float:
    users, nodes = rtt.shape
    served = np.kron(np.eye(users), np.ones((1, nodes)))
    load = np.kron(np.ones((1, users)), np.eye(nodes))
    return float(linprog(rtt.ravel(), A_ub=load, b_ub=capacities, A_eq=served, b_eq=weights).fun)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), users=st.integers(1, 12), nodes=st.integers(1, 4), slack=st.floats(1.0, 2.0)
)
def test_assignment_is_the_cheapest_flow(seed: int, users: int, nodes: int, slack: float) -> None:
    random = np.random.default_rng(seed)
    rtt, weights = random.uniform(1, 100, (users, nodes)), random.uniform(0.1, 5.0, users)
    shares = random.uniform(0.1, 1.0, nodes)
    capacities = slack * weights.sum() * shares / shares.sum()
    found = assign(rtt, weights, capacities)
    assert found.unserved <= 1e-6
    assert (found.flow.sum(axis=0) <= capacities + 1e-6).all()
    assert np.allclose(found.flow.sum(axis=1), weights)
    assert found.total == pytest.approx(optimal_flow(rtt, weights, capacities), rel=1e-6)
    assert (found.prices >= -1e-9).all()


@pytest.mark.parametrize("seed", range(4))
def test_capacities_are_kept_and_the_answer_is_near_the_best_of_all_sets(seed: int) -> None:
    from itertools import combinations

    matrix, _ = regions((6, 4, 3), seed=seed)
    random = np.random.default_rng(seed)
    weights, capacities = random.uniform(0.5, 2.0, 13), random.uniform(3.0, 9.0, 13)
    result = place(Problem(matrix.rtt, weights, 4, capacities), rng())
    assert (result.flow.sum(axis=0) <= capacities[result.nodes] + 1e-6).all()
    best = (
        min(
            assign(matrix.rtt[:, list(chosen)], weights, capacities[list(chosen)]).total
            for chosen in combinations(range(13), 4)
            if capacities[list(chosen)].sum() >= weights.sum()
        )
        / weights.sum()
    )
    assert best * (1 - 1e-9) <= result.mean_ms <= best * 1.01
    assert result.bound_ms <= best * (1 + 1e-9)


def test_users_weights_pull_the_replica() -> None:
    matrix, region = regions((10, 10), seed=2)
    for where in (0, 1):
        weights = np.where(region == where, 10.0, 1.0)
        assert region[place(Problem(matrix.rtt, weights, 1), rng()).nodes[0]] == where


def test_unknown_pairs_are_avoided_and_what_is_left_is_unserved() -> None:
    matrix, _ = regions((8, 8), seed=3)
    rtt = matrix.rtt.copy()
    rtt[:, 2] = np.nan  # a node that nobody reaches
    rtt[5] = np.nan  # a user that reaches nobody
    result = place(Problem(rtt, np.ones(16), 2), rng())
    assert 2 not in result.nodes
    assert result.unserved == pytest.approx(1.0)
    assert result.mean_ms < 100.0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"replicas": 0}, "0 replicas on 10 nodes"),
        ({"replicas": 11}, "11 replicas on 10 nodes, expected 1 to 10"),
        ({"weights": np.zeros(10)}, "more than nothing"),
        ({"weights": np.full(10, np.nan)}, "finite"),
        ({"weights": np.ones(9)}, "demand for 9 access nodes, expected 10"),
        ({"capacities": np.full(10, 3.0)}, "the 2 largest capacities hold 6 of a demand of 10"),
        ({"capacities": np.full(10, -3.0)}, "not negative"),
        ({"allowed": np.arange(10) == 1}, "2 replicas on 1 nodes"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, Any], text: str) -> None:
    matrix, _ = regions((5, 5), seed=4)
    fields: dict[str, Any] = {"rtt": matrix.rtt, "weights": np.ones(10), "replicas": 2} | change
    with pytest.raises(PlacementError, match=text):
        place(Problem(**fields), rng())


def test_service_stays_while_the_gain_is_small() -> None:
    matrix, _ = regions((20, 15, 10), seed=5)
    problem = Problem(matrix.rtt, np.ones(45), 3)
    current = decide(problem, [], rng()).nodes
    for seed in range(5):
        decision = decide(Problem(noisy(matrix.rtt, seed), np.ones(45), 3), current.tolist(), rng())
        assert decision.moves == ()
        assert decision.nodes.tolist() == current.tolist()
        assert "stays" in decision.reason


def test_service_follows_its_users_by_no_more_moves_than_the_cap() -> None:
    matrix, region = regions((15, 15, 15, 15), seed=6)
    before, after = (np.where(np.isin(region, where), 10.0, 0.01) for where in ((0, 1), (2, 3)))
    current = place(Problem(matrix.rtt, before, 2), rng()).nodes
    problem = Problem(matrix.rtt, after, 2)
    means = [mean_of(problem, current)]
    for _ in range(4):
        decision = decide(problem, current.tolist(), rng(), Policy(moves_max=1))
        assert len(decision.moves) <= 1
        current = decision.nodes
        means.append(mean_of(problem, current))
    assert means == sorted(means, reverse=True)
    assert sorted(region[current].tolist()) == [2, 3]
    assert decision.moves == ()


@pytest.mark.parametrize("cap", [1, 2])
def test_every_move_over_many_rounds_passes_the_thresholds_and_the_cap(cap: int) -> None:
    matrix, region = regions((12, 12, 12, 12), seed=16)
    policy = Policy(gain_ms=5.0, gain_share=0.1, moves_max=cap)
    random = np.random.default_rng(17)
    current: list[int] = []
    moved = 0
    for cycle in range(24):
        busy = (cycle // 6) % 4  # the users wander from region to region, and what is measured is noisy
        weights = np.where(region == busy, 10.0, 1.0) * random.uniform(0.8, 1.2, 48)
        problem = Problem(noisy(matrix.rtt, cycle), weights, 3)
        decision = decide(problem, current, rng(), policy)
        if current:
            before, best = mean_of(problem, np.array(current)), decision.best.mean_ms
            enough = before - best >= policy.gain_ms and before - best >= policy.gain_share * before
            assert len(decision.moves) <= cap
            assert not decision.moves or enough
            assert len(set(decision.nodes.tolist()) - set(current)) == len(decision.moves)
            moved += len(decision.moves)
        current = decision.nodes.tolist()
    assert 0 < moved <= 24


def test_replica_on_a_node_that_is_gone_is_replaced_without_moving_the_others() -> None:
    matrix, _ = regions((10, 10, 10), seed=7)
    problem = Problem(matrix.rtt, np.ones(30), 3)
    current = place(problem, rng()).nodes.tolist()
    allowed = np.arange(30) != current[0]
    decision = decide(Problem(matrix.rtt, np.ones(30), 3, None, allowed), current, rng())
    assert set(current[1:]) <= set(decision.nodes.tolist())
    assert [old for old, _ in decision.moves] == [-1]
    assert current[0] not in decision.nodes


def test_replicas_that_leave_too_little_room_are_placed_anew() -> None:
    matrix, _ = regions((4, 4), seed=10)
    capacities = np.array([1.0, 1.0, 6.0, 6.0, 1.0, 1.0, 1.0, 1.0])
    decision = decide(Problem(matrix.rtt, np.ones(8), 2, capacities), [0], rng())
    assert decision.nodes.tolist() == [2, 3]
    assert sorted(decision.moves) == [(-1, 2), (0, 3)]
    assert "placed anew" in decision.reason


def test_fewer_replicas_close_the_least_missed() -> None:
    matrix, region = regions((20, 10, 3), seed=8)
    current = place(Problem(matrix.rtt, np.ones(33), 3), rng()).nodes
    decision = decide(Problem(matrix.rtt, np.ones(33), 2), current.tolist(), rng())
    assert set(decision.nodes.tolist()) < set(current.tolist())
    assert sorted(region[decision.nodes].tolist()) == [0, 1]


def test_explanation_says_of_each_candidate_why() -> None:
    matrix, _ = regions((10, 10), seed=9)
    rtt = matrix.rtt.copy()
    rtt[:, 3] = np.nan
    allowed = np.arange(20) != 5
    problem = Problem(rtt, np.ones(20), 2, None, allowed)
    result = place(problem, rng())
    account = explain(problem, result.nodes, result.flow, np.full((20, 20), 0.1), listed=20)
    verdicts = {item.node: item.verdict for item in account}
    assert len(account) == 20
    assert "not allowed" in verdicts[5]
    assert "too little data" in verdicts[3]
    assert all("too little is measured to be sure" in verdicts[node] for node in result.nodes.tolist())
    refused = [item for item in account if not item.chosen and item.node not in (3, 5)]
    assert all("ms in place of node" in item.verdict and item.verdict.startswith("+") for item in refused)


@pytest.mark.skipif(not DATA, reason="real matrices: CROSSEDGE_DATA is unset")
@pytest.mark.parametrize(("replicas", "optimum"), [(3, 45.5), (5, 36.7), (8, 29.1), (20, 16.35)])
def test_real_optima_are_met(replicas: int, optimum: float) -> None:
    rtt = read_matrix(Path(str(DATA)) / "wondernetwork217/wonderproxy.csv").rtt
    result = place(Problem(rtt, np.ones(217), replicas), rng())
    assert result.mean_ms <= optimum * 1.002
    assert result.bound_ms <= optimum * 1.002
    assert result.gap <= 0.01


@pytest.mark.skipif(not DATA, reason="real matrices: CROSSEDGE_DATA is unset")
def test_search_ends_at_the_optimum_whatever_the_seed() -> None:
    rtt = read_matrix(Path(str(DATA)) / "planetlab490/PlanetLabData_9.tsv.gz").rtt
    results = [place(Problem(rtt, np.ones(490), 5), np.random.default_rng(seed)) for seed in (1, 20261122)]
    assert [result.mean_ms for result in results] == pytest.approx([34.5197] * 2, rel=1e-3)
    assert max(result.gap for result in results) <= 1e-3
