"""Placements with capacities against all sets, and against optima that other solvers proved."""

from __future__ import annotations

import json
import os
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from crossedge.sched.bounds import Relaxation
from crossedge.sched.branching import Search
from crossedge.sched.capacities import assign
from crossedge.sched.completion import completed
from crossedge.sched.files import read_matrix
from crossedge.sched.placement import Problem, place
from tests.sched_worlds import regions

DATA = os.environ.get("CROSSEDGE_DATA")
OPTIMA = Path(__file__).parents[1] / "benchmarks" / "optima.json"


def best_of_all(rtt: np.ndarray, weights: np.ndarray, capacities: np.ndarray, replicas: int) -> float:
    """Return the least mean over all sets that hold the demand."""
    sets = [list(chosen) for chosen in combinations(range(rtt.shape[1]), replicas)]
    fits = [chosen for chosen in sets if capacities[chosen].sum() >= weights.sum()]
    return min(assign(rtt[:, c], weights, capacities[c]).total for c in fits) / float(weights.sum())


@pytest.mark.parametrize("seed", range(12))
def test_small_problems_with_capacities_are_proven(seed: int) -> None:
    random = np.random.default_rng(seed)
    rtt = regions((5, 4, 3), seed=seed)[0].rtt if seed % 3 else random.uniform(1.0, 100.0, (12, 12))
    replicas = 2 + seed % 3
    if seed % 2:
        weights, capacities = np.ones(12), np.full(12, np.ceil(1.2 * 12 / replicas))
    else:
        weights, capacities = random.uniform(0.5, 2.0, 12), random.uniform(5.0, 14.0, 12)
    best = best_of_all(rtt, weights, capacities, replicas)
    result = place(Problem(rtt, weights, replicas, capacities), np.random.default_rng(0))
    assert result.bound_ms <= best * (1 + 1e-9)
    assert result.mean_ms == pytest.approx(best, rel=1e-3)
    assert result.gap <= 2e-3


def test_bound_holds_wherever_the_search_stops() -> None:
    rtt = regions((7, 7, 6), seed=3)[0].rtt
    weights, capacities = np.ones(20), np.full(20, 8.0)
    best = best_of_all(rtt, weights, capacities, 3) * 20
    opened = np.array([0, 1, 2])
    bounds = []
    for work in (0.0, 1e5, 1e6, 1e7, 1e8):
        search = Search(rtt, weights, capacities, opened, assign(rtt[:, opened], weights, capacities[opened]))
        search.run(Relaxation(rtt, weights, capacities).start(opened), work)
        bounds.append(search.bound())
        assert search.bound() <= best * (1 + 1e-9) <= search.best.assignment.total * (1 + 2e-9)
    assert bounds == sorted(bounds)
    assert bounds[-1] >= best * (1 - 1e-3)


def test_regions_that_need_a_replica_more_than_there_are_leave_no_gap() -> None:
    rtt = regions((17, 17, 18), seed=4, apart=100.0, wide=0.5)[0].rtt
    result = place(Problem(rtt, np.ones(52), 5, np.full(52, 13.0)), np.random.default_rng(0))
    assert (
        result.gap <= 1e-3
    )  # the relaxation alone opens 1.3 replicas per region: its bound is a tenth of this


@pytest.mark.skipif(not DATA, reason="real matrices: CROSSEDGE_DATA is unset")
@pytest.mark.parametrize(
    ("name", "path", "replicas"),
    [
        ("aws21", "aws21/aws.csv", 3),
        ("aws21", "aws21/aws.csv", 8),
        ("wondernetwork217", "wondernetwork217/wonderproxy.csv", 5),
    ],
)
def test_real_optima_within_capacities_are_met_and_not_passed(name: str, path: str, replicas: int) -> None:
    known = json.loads(OPTIMA.read_text())[f"{name}.capacitated.p{replicas}"]
    rtt = completed(read_matrix(Path(str(DATA)) / path), np.random.default_rng(0), "coordinates").matrix.rtt
    n = len(rtt)
    problem = Problem(rtt, np.ones(n), replicas, np.full(n, np.ceil(1.2 * n / replicas)))
    result = place(problem, np.random.default_rng(5))
    assert result.mean_ms <= known["mean_ms"] * 1.001
    assert result.bound_ms <= known["mean_ms"] * (1 + 1e-6)
    assert result.gap <= 1e-3
