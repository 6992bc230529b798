"""Simple placements to compare with: random, spread evenly, one per group, greedy."""

from __future__ import annotations

import numpy as np

from crossedge.sched import median
from crossedge.sched.groups import Grouping, medoid, with_count
from crossedge.sched.matrix import Ints
from crossedge.sched.placement import Problem, flow_to, served

DRAWS = 100


def spread(labels: Ints, replicas: int, rng: np.random.Generator) -> Ints:
    """Return nodes as a topology spread constraint would: the groups in turn, any node of a group."""
    queues = [list(rng.permutation(np.nonzero(labels == group)[0])) for group in np.unique(labels)]
    order = list(rng.permutation(len(queues)))
    result: list[int] = []
    while len(result) < replicas:
        for group in order:
            if queues[group] and len(result) < replicas:
                result.append(int(queues[group].pop()))
    return np.array(result, dtype=np.int64)


def one_per_group(problem: Problem, scale: float) -> Ints:
    """Return the medoids of as many spectral groups as there are replicas; filled up greedily where some are
    empty.
    """
    labels = with_count(problem.rtt, problem.replicas, scale)
    chosen = [medoid(problem.rtt, np.nonzero(labels == group)[0]) for group in np.unique(labels)]
    cost = np.nan_to_num(problem.rtt, nan=1e4) * problem.weights[:, None]
    return median.greedy(cost, problem.replicas, np.array(chosen, dtype=np.int64))


def baselines(problem: Problem, groups: Grouping, rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    """Return mean and 95th percentile in ms of each baseline; of those that draw lots, the mean over 100
    draws.

    The problem's users are its nodes. Capacities are kept in the assignment; a draw may lack the room, and
    what is unserved then counts for nothing, in the baseline's favour.
    """
    n = len(problem.rtt)

    def judged(nodes: Ints) -> tuple[float, float]:
        rtt, flow = flow_to(problem, np.sort(nodes))
        mean, tail, _ = served(rtt, flow)
        return mean, tail

    def averaged(draws: list[Ints]) -> tuple[float, float]:
        results = np.array([judged(nodes) for nodes in draws])
        return float(results[:, 0].mean()), float(results[:, 1].mean())

    p = problem.replicas
    cost = np.nan_to_num(problem.rtt, nan=1e4) * problem.weights[:, None]
    return {
        "random": averaged([rng.choice(n, p, replace=False) for _ in range(DRAWS)]),
        "spread-evenly": averaged([spread(groups.labels, p, rng) for _ in range(DRAWS)]),
        "one-per-group": judged(one_per_group(problem, groups.scale_ms)),
        "greedy": judged(median.greedy(cost, p)),
    }
